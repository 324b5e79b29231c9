"""What surrounds every request: an id, stage times, the duration metric, and problem details for faults."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError, problem_response
from service.intake import Uploads
from service.journal import Journal
from service.metrics import UNMATCHED, Metrics
from service.protocol import ABANDONED, ANSWERING, REQUEST_ID, own_request_id
from service.timing import StageClock

log = logging.getLogger(__name__)

_REQUEST_ID = REQUEST_ID.lower().encode()


class RequestFrame:
    """Pure ASGI, so a streamed body is never buffered on its way."""

    def __init__(self, app: ASGIApp, metrics: Metrics, uploads: Uploads, journal: Journal) -> None:
        self._app = app
        self._metrics = metrics
        self._uploads = uploads
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        clock = StageClock(self._metrics, state.get(ABANDONED, lambda: False))
        state["clock"] = clock
        answering = state.get(ANSWERING, lambda: None)
        request_id = own_request_id(Headers(scope=scope).get(REQUEST_ID, ""))
        status = 500
        started = False
        start = time.perf_counter()

        async def send_framed(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                timing = clock.header() or f"total;dur={(time.perf_counter() - start) * 1000:.1f}"
                message["headers"] = [
                    *message.get("headers", ()),
                    (_REQUEST_ID, request_id.encode("latin-1")),
                    (b"server-timing", timing.encode("latin-1")),
                ]
                # Before it is sent, which waits for a client that does not read.
                answering()
            await send(message)

        try:
            await self._app(scope, receive, send_framed)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            error = ServiceError("the service failed on this request; the failure is logged")
            await problem_response(error, scope["path"])(scope, receive, send_framed)
        finally:
            self._uploads.release(state)
            route, took_s = _route(scope), time.perf_counter() - start
            self._metrics.answered(route, scope["method"], status, took_s)
            self._journal.tell(scope, route, status, took_s, request_id)


def _route(scope: Scope) -> str:
    """The route's template: paths as called are unbounded, and hold speakers' ids."""
    route = scope.get("route")
    return getattr(route, "path", UNMATCHED)
