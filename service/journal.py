"""What the log tells of requests: who changed what, who was refused, what failed; or all of them, if asked to.

Never audio, keys or speakers' ids, which would outlive their deletion: routes are told by their template, and the
request's id leads to what the caller knows of it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

log = logging.getLogger(__name__)

# In a request's state: the name of its key, and the code of the problem it was answered with.
CALLER = "caller"
CODE = "code"
# By the route's template. Where an alias was moved to is told by its route.
CHANGES = frozenset(
    (
        ("POST", "/v1/speakers/{speaker_id}/enrollments"),
        ("DELETE", "/v1/speakers/{speaker_id}"),
    )
)
REFUSED = (401, 403)
# Of these there are as many as requests, at the worst time; metrics count them, and the store says why it fails.
UNTOLD = ("overloaded", "storage_unavailable")
# Whoever guesses keys must not fill the disk.
MOST_REFUSED_PER_S = 10


class Journal:
    """`everything` for a line for each request."""

    def __init__(self, *, everything: bool) -> None:
        self._everything = everything
        self._second = 0
        self._refused = 0

    def tell(self, scope: Any, route: str, status: int, took_s: float, request_id: str) -> None:
        """Log a request that was answered, if it is one to be told of."""
        method, code = scope["method"], scope["state"].get(CODE, "")
        failed = status >= 500 and code not in UNTOLD
        refused = status in REFUSED and self._may_tell()
        changed = (method, route) in CHANGES
        if not (self._everything or failed or refused or changed):
            return
        log.log(
            logging.WARNING if failed or refused else logging.INFO,
            "%s %s %d%s in %.0f ms, key %s, request %s",
            method,
            route,
            status,
            f" {code}" if code else "",
            took_s * 1000,
            scope["state"].get(CALLER, "none"),
            request_id,
        )

    def _may_tell(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            if self._refused > MOST_REFUSED_PER_S:
                log.warning("%d more requests were refused (401 or 403)", self._refused - MOST_REFUSED_PER_S)
            self._second, self._refused = second, 0
        self._refused += 1
        return self._refused <= MOST_REFUSED_PER_S
