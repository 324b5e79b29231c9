"""API keys: who calls, what they may do, and how often."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from service.errors import ForbiddenError, RateLimitedError, UnauthenticatedError
from service.journal import CALLER
from service.settings import ApiKey, Scope, Settings, is_loopback

KEY_BYTES = 32
DEFAULT_TENANT = "default"
# A browser cannot set headers on a WebSocket: it offers the subprotocols `bearer` and the key. Not the query, which
# proxies write into their logs.
BEARER_PROTOCOL = "bearer"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller; without configured keys, everyone on this machine is `anonymous`."""

    name: str
    tenant: str
    scopes: frozenset[Scope]


ANONYMOUS = Caller("anonymous", DEFAULT_TENANT, frozenset(("infer", "enrol", "admin")))


class Authenticator:
    """Maps a request to its caller. Keys are compared by SHA-256, so no secret is kept in memory."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys: dict[str, ApiKey] = {key.sha256: key for key in settings.api_keys}
        self._rate = settings.rate_per_minute / 60
        self._burst = max(1.0, float(settings.rate_per_minute))
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def caller(self, request: HTTPConnection, scope: Scope) -> Caller:
        """Raises UnauthenticatedError, ForbiddenError, RateLimitedError."""
        if self._keys:
            caller = self._identify(request)
        else:
            _refuse_other_pages(request)
            caller = ANONYMOUS
        request.scope.setdefault("state", {})[CALLER] = caller.name
        if scope not in caller.scopes:
            raise ForbiddenError(f"key {caller.name!r} lacks the scope {scope!r}")
        if self._rate > 0:
            self._spend(caller.name)
        return caller

    def _identify(self, request: HTTPConnection) -> Caller:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        secret = token.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
        offered = request.scope.get("subprotocols", [])
        if not secret and len(offered) == 2 and offered[0] == BEARER_PROTOCOL:
            secret = offered[1]
        if not secret:
            raise UnauthenticatedError("send `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        # The digest of an unguessable key may be looked up in a table: timing tells nothing of the key.
        key = self._keys.get(hash_key(secret))
        if key is None:
            raise UnauthenticatedError("unknown API key")
        return Caller(key.name, key.tenant, frozenset(key.scopes))

    def _spend(self, name: str) -> None:
        """A token bucket that holds one minute's worth."""
        now = self._clock()
        tokens, last = self._buckets.get(name, (self._burst, now))
        tokens = min(self._burst, tokens + (now - last) * self._rate)
        if tokens < 1:
            self._buckets[name] = (tokens, now)
            raise RateLimitedError(f"key {name!r} is over its rate", retry_after_s=(1 - tokens) / self._rate)
        self._buckets[name] = (tokens - 1, now)


def _refuse_other_pages(request: HTTPConnection) -> None:
    """Without keys whoever reaches the service may use it, and a browser on this machine reaches it for every page
    that is open in it. Forms and WebSockets it sends without asking first; and a page can give its own name this
    machine's address. Raises ForbiddenError."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if host and not _names_this_machine(host):
        raise ForbiddenError(f"without API keys, this service is 127.0.0.1 or localhost, not {host[:80]!r}")
    if origin and origin.partition("://")[2] != host:
        raise ForbiddenError("without API keys, pages of other origins may not use this service")


@lru_cache(maxsize=64)
def _names_this_machine(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def hash_key(secret: str) -> str:
    """SHA-256 in hex, as configured in `SOTTO_API_KEYS`."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key() -> str:
    """A fresh secret of 256 bits."""
    return "sotto_" + secrets.token_urlsafe(KEY_BYTES)
