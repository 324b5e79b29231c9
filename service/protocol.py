"""HTTP/1.1 with clients that are slow, greedy or many. uvicorn bounds none of these by itself:

a head that trickles in or never ends, a body slower than `least_body_rate`, a response that nobody reads, and more
connections than `limit_connections`, past which only probes and metrics are answered.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import PROBLEM_JSON, HeadTooLargeError, OverloadedError, RequestTooSlowError, ServiceError
from service.settings import Settings

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

# Request line and headers; nginx allows as much.
MOST_HEAD_BYTES = 32 * 1024
# A body may begin slowly: connections have to find their speed.
BODY_GRACE_S = 5.0
BODY_LOOK_EVERY_S = 1.0
RETRY_AFTER_S = 2.0
# In a request's state: says whether its client has gone.
ABANDONED = "abandoned"
# Answered however many connections there are, or Kubernetes would restart a service for being popular.
ALWAYS_ANSWERED = frozenset(("/healthz", "/readyz", "/metrics"))
# Times `limit_connections`: here even an answer would cost too much.
NOT_ACCEPTED = 2


def protocol_for(settings: Settings) -> type[HttpToolsProtocol]:
    """The protocol class for uvicorn, which builds one for each connection by itself."""

    class Bounded(_BoundedProtocol):
        bounds = settings

    return Bounded


class _BoundedProtocol(HttpToolsProtocol):
    bounds: Settings

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._in_head = True
        self._body_bytes = 0
        self._body_since = 0.0
        self._receiving: TimerHandle | None = None
        self._sending: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > NOT_ACCEPTED * self.bounds.limit_connections:
            transport.abort()
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MOST_HEAD_BYTES:
            self._refuse(HeadTooLargeError(f"request line and headers take more than {MOST_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._receiving is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop(receiving=True)
        self._body_bytes, self._body_since = 0, self.loop.time()
        self._receiving = self.loop.call_later(BODY_LOOK_EVERY_S, self._look_at_body)
        crowded = len(self.connections) > self.bounds.limit_connections
        path = self.url.partition(b"?")[0].decode("latin-1")
        app = self.app
        if crowded and path not in ALWAYS_ANSWERED:
            self.app = _refuse_crowd
        try:
            super().on_headers_complete()
        finally:
            self.app = app
        if self.cycle is not None and self.cycle.scope is self.scope:
            cycle = self.cycle
            self.scope["state"][ABANDONED] = lambda: cycle.disconnected

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop(receiving=True)
        self._head_bytes = 0
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._stop(receiving=True, sending=True)
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(receiving=True, sending=True)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self.bounds.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(sending=True)
        super().resume_writing()

    def _wait_for_head(self) -> None:
        limit_s = self.bounds.head_timeout_s
        error = RequestTooSlowError(f"no whole request head in {limit_s:g} s")
        self._receiving = self.loop.call_later(limit_s, self._refuse, error)

    def _look_at_body(self) -> None:
        elapsed_s = self.loop.time() - self._body_since
        least = self.bounds.least_body_rate
        # While uvicorn itself does not read, the client is not to blame.
        if elapsed_s > BODY_GRACE_S and self._body_bytes < least * elapsed_s and not self.flow.read_paused:
            self._refuse(RequestTooSlowError(f"the body comes in at less than {least} bytes a second"))
            return
        self._receiving = self.loop.call_later(BODY_LOOK_EVERY_S, self._look_at_body)

    def _stop(self, *, receiving: bool = False, sending: bool = False) -> None:
        if receiving and self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
        if sending and self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _refuse(self, error: ServiceError) -> None:
        """Say why, unless an answer is under way, and close."""
        self._stop(receiving=True)
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = json.dumps(error.problem("")).encode()
            status = HTTPStatus(error.status)
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {PROBLEM_JSON}\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


async def _refuse_crowd(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:  # noqa: ARG001
    """An ASGI application that is always full."""
    error = OverloadedError("too many connections are open", retry_after_s=RETRY_AFTER_S)
    body = json.dumps(error.problem(str(scope.get("path", "")))).encode()
    headers = {
        "content-type": PROBLEM_JSON,
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers(),
    }
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
