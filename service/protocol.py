"""HTTP/1.1 with clients that are slow, greedy or many. uvicorn bounds none of these by itself:

a head that trickles in or has no end, trailers without end, a body slower than `least_body_rate`, an answer read more
slowly than that or not at all (`unread.py`), more connections than `limit_connections`, and more requests than can be
answered in time: those are turned away at their head (`congestion.py`). Of too many connections the one that has been
idle for longest is closed. Where none is idle, those that came last are answered probes and metrics only, and past
twice as many nothing. They are kept: taking one in costs as much as several refusals, and where all were sent away to
come again the loop had time for nothing else.
"""

from __future__ import annotations

import asyncio
import random
import re
import weakref
from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.congestion import SHARE, Congestion
from service.errors import (
    HeadTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
    OverloadedError,
    RequestTooSlowError,
    ServiceError,
)
from service.intake import TIMEOUT_HEADER, WHOLE, time_given_s
from service.lingering import LingeringTransport
from service.metrics import UNMATCHED, Metrics
from service.refusals import in_full, too_many
from service.settings import Settings
from service.unread import Readers
from service.websocket import BoundedStream

if TYPE_CHECKING:
    from asyncio import TimerHandle

# Request line and headers, or trailers; nginx allows as much. What comes in one piece may be longer by that piece.
MOST_HEAD_BYTES = 32 * 1024
# Who has been idle for so long may be closed to make room for others.
LEAST_IDLE_S = 1.0
# Of `head_timeout_s`, how much longer it may be.
HEAD_TIMEOUT_SPREAD = 0.1
# A body may begin slowly: connections have to find their speed.
BODY_GRACE_S = 5.0
BODY_LOOK_EVERY_S = 1.0
# In a request's state: says whether its client has gone.
ABANDONED = "abandoned"
# In a request's state: to be called when its answer begins.
ANSWERING = "answering"
# Answered however many connections there are, or Kubernetes would restart a service for being popular.
ALWAYS_ANSWERED = frozenset(("/healthz", "/readyz", "/metrics"))
# What is turned away may be read to its end, so that the client keeps its connection, if it is no longer than this.
MOST_UNWANTED_BYTES = 2**20
REQUEST_ID = "X-Request-ID"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Times `limit_connections`: here even an answer would cost too much.
NOT_ACCEPTED = 2
# What we send on a stream are small messages: whoever leaves so much of them unread does so on purpose.
MOST_UNREAD_BYTES = 2**20
UNREAD_LOOK_EVERY_S = 1.0


def protocol_for(settings: Settings, metrics: Metrics) -> type[BoundedHttp]:
    """The protocol class for uvicorn, which makes one for each connection by itself."""

    bound = {"bounds": settings, "metrics": metrics, "congestion": Congestion(), "idle": {}}
    return type("Bounded", (BoundedHttp,), bound)


class BoundedHttp(HttpToolsProtocol):
    bounds: Settings
    metrics: Metrics
    congestion: Congestion
    # Of all connections those between two requests, longest first, and since when.
    idle: dict[BoundedHttp, float]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._in_head = True
        self._in_message = False
        self._body_bytes = 0
        self._body_since = 0.0
        self._receiving: TimerHandle | None = None
        self._under_way = self._turned_away = self._upgraded = self._beyond = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._sending = LingeringTransport(transport, self, least_rate=self.bounds.least_body_rate)
        super().connection_made(self._sending)  # type: ignore[arg-type]  # all that is asked of one
        self._beyond = len(self.connections) > self.bounds.limit_connections and not self._make_room()
        if self._beyond and len(self.connections) > NOT_ACCEPTED * self.bounds.limit_connections:
            transport.abort()
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._upgraded:
            return
        if self._head_bytes > MOST_HEAD_BYTES:
            what = "request line and headers take" if self._in_head else "what is no body takes"
            self._refuse(HeadTooLargeError(f"{what} more than {MOST_HEAD_BYTES} bytes"))
        # Bytes stop uvicorn's timer of idle connections. Where they began no request (an empty line, the rest of a
        # body whose answer is out), nothing else would ever end this one.
        waits = (self.cycle is None or self.cycle.response_complete) and not self.pipeline
        timed = self._receiving is not None or self.timeout_keep_alive_task is not None
        if waits and not timed:
            self._await_next()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # Of a request that came before in the same piece.
        self._unset_keepalive_if_required()
        self._in_head = self._in_message = True
        if self._receiving is None:
            self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are none of the head's: its checks have passed (RFC 9110, section 6.5.1).
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop()
        if self.transport.is_closing():
            # Behind one that was refused: nobody will hear an answer.
            self._turned_away = True
            return
        if self.parser.should_upgrade() and self._should_upgrade():
            if self._is_crowded():
                self._in_head = True
                self._refuse(too_many(), "GET")
            super().on_headers_complete()
            return
        self._body_bytes, self._body_since = 0, self.loop.time()
        self._receiving = self.loop.call_later(BODY_LOOK_EVERY_S, self._look_at_body)
        path = self.url.partition(b"?")[0].decode("latin-1")
        if path not in ALWAYS_ANSWERED:
            self.congestion.hear(self.loop.call_soon)
            wait_s, crowded = self.congestion.wait_s, self._is_crowded()
            if (crowded or wait_s) and self._turn_away(too_many() if crowded else None, wait_s):
                return
        super().on_headers_complete()
        # Weak, or every request would be a cycle of references for the collector.
        cycle, count_out = weakref.ref(self.cycle), weakref.WeakMethod(self._count_out)

        def answering() -> None:
            if found := count_out():
                found()

        self.scope["state"] |= {
            ABANDONED: lambda: (found := cycle()) is None or found.disconnected,
            ANSWERING: answering,
            WHOLE: lambda: (found := cycle()) is not None and not found.more_body,
        }

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        # From here on of what follows: extensions of chunks, trailers.
        self._head_bytes = 0
        if not self._turned_away:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop()
        self._in_message = False
        self._head_bytes = 0
        if self._turned_away:
            self._turned_away = False
            self._await_next()
            return
        # Where it was answered at its head there is nothing more to wait for. A connection's requests are answered one
        # after the other, so one at a time counts: thousands of them in one piece are no crowd.
        if not self.pipeline and self.cycle is not None and not self.cycle.response_started:
            self._count_in()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._sending.flush()
        self._count_out()
        if self.pipeline and not self.pipeline[-1][0].more_body:
            self._count_in()
        super().on_response_complete()
        # Of a request that follows, a part of the head may be there.
        if self.timeout_keep_alive_task is not None and not self._in_message:
            self.idle[self] = self.loop.time()

    def handle_websocket_upgrade(self) -> None:
        self._stop()
        if self.cycle is not None and not self.cycle.response_complete:
            # Behind a request whose answer is owed: two protocols would write to one connection.
            self.transport.close()
        if not self.transport.is_closing():
            self._upgraded = True
            super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self.idle.pop(self, None)
        self._count_out()
        super().connection_lost(exc)

    def hears_more(self) -> bool:
        return self._in_message

    def part(self) -> None:
        # What uvicorn does for an application whose client has gone.
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, in the one error shape."""
        self._in_message = True
        self._refuse(MalformedRequestError(f"this is no HTTP/1.1: {msg}"))

    def _wait_for_head(self) -> None:
        limit_s = self.bounds.head_timeout_s
        error = RequestTooSlowError(f"no whole request head in {limit_s:g} s")
        # Connections that were opened together are not to be closed, and opened anew, in one turn of the loop.
        later_s = limit_s * HEAD_TIMEOUT_SPREAD * random.random()
        self._receiving = self.loop.call_later(limit_s + later_s, self._refuse, error)

    def _look_at_body(self) -> None:
        elapsed_s = self.loop.time() - self._body_since
        least = self.bounds.least_body_rate
        # While uvicorn does not read, or has not told the client to go on, the client is not to blame.
        ours = self.flow.read_paused or (self.cycle is not None and self.cycle.waiting_for_100_continue)
        if elapsed_s > BODY_GRACE_S and self._body_bytes < least * elapsed_s and not ours:
            self._refuse(RequestTooSlowError(f"the body comes in at less than {least} bytes a second"))
            return
        self._receiving = self.loop.call_later(BODY_LOOK_EVERY_S, self._look_at_body)

    def _count_in(self) -> None:
        if not self._under_way and not self.transport.is_closing():
            self._under_way = True
            self.congestion.begin()

    def _count_out(self) -> None:
        if self._under_way:
            self._under_way = False
            self.congestion.end()

    def _await_next(self) -> None:
        """Keep the connection for another request, not for ever."""
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            self.idle[self] = self.loop.time()

    def _make_room(self) -> bool:
        """As nginx does: close who has been idle for longest, two for one that comes, so that there will be room. False
        if there is nobody who has been so for a while: what was answered just now may be sending its next request."""
        before = self.loop.time() - LEAST_IDLE_S
        idle = [connection for connection, since in islice(self.idle.items(), 2) if since <= before]
        for connection in idle:
            connection.timeout_keep_alive_handler()
        return bool(idle)

    def _is_crowded(self) -> bool:
        """Whether it came when there were too many, none of them idle, and that is still so."""
        if self._beyond and (len(self.connections) <= self.bounds.limit_connections or self._make_room()):
            self._beyond = False
        return self._beyond

    def _unset_keepalive_if_required(self) -> None:
        super()._unset_keepalive_if_required()
        self.idle.pop(self, None)

    def timeout_keep_alive_handler(self) -> None:
        self.idle.pop(self, None)
        super().timeout_keep_alive_handler()

    def _stop(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _count(self, error: ServiceError, method: str = "") -> None:
        """A request that the application is not given, of which nothing but its method may be known."""
        self.metrics.rejects.labels(error.code).inc()
        self.metrics.answered(UNMATCHED, method, error.status, 0.0)

    def _refuse(self, error: ServiceError, method: str = "") -> None:
        """Close; say why where no answer is out or owed to a request before."""
        self._stop()
        if self.transport.is_closing():
            return
        if self._in_head:
            self._count(error, method)
        else:
            # The application has begun on it, and so it counts there.
            self.metrics.rejects.labels(error.code).inc()
        cycle = self.cycle
        silent = cycle is not None and (not cycle.response_complete if self._in_head else cycle.response_started)
        if not silent and not self.pipeline and not self._turned_away:
            self.transport.write(in_full(error, "", {REQUEST_ID: own_request_id("")}, close=True))
        self.transport.close()

    def _turn_away(self, crowd: OverloadedError | None, wait_s: float) -> bool:
        """Answer a request at its head, if there is a crowd or its time is too short for such a wait."""
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is owed to one before it, and connections get one at a time.
            return False
        headers = {name.decode("latin-1"): text.decode("latin-1") for name, text in self.headers}
        error = crowd or self._too_long(wait_s, headers.get(TIMEOUT_HEADER))
        if error is None:
            return False
        length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        short = length.isdigit() and int(length) <= MOST_UNWANTED_BYTES and not self.expect_100_continue
        kept = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"
        # To one that does not read its answers no more of them are written.
        method = self.parser.get_method().decode("ascii")
        if not short or not kept or method == "HEAD" or self.flow.write_paused:
            self._in_head = True
            self._refuse(error, method)
        else:
            self._count(error, method)
            path = self.url.partition(b"?")[0].decode("latin-1")
            given = headers.get(REQUEST_ID.lower(), "")
            self.transport.write(in_full(error, path, {REQUEST_ID: own_request_id(given)}, close=False))
        self._turned_away = True
        return True

    def _too_long(self, wait_s: float, asked: str | None) -> OverloadedError | None:
        """Unless a request that asks for so many milliseconds has the time for such a wait."""
        try:
            given_s = time_given_s(asked, self.bounds)
        except InvalidRequestError:
            # The route says so, should it get there.
            given_s = self.bounds.request_timeout_s
        if wait_s <= SHARE * given_s:
            return None
        return OverloadedError(f"it would take {wait_s:.1f} s", retry_after_s=wait_s - SHARE * given_s)


async def cut_off_unread(connections: Collection[Any], bounds: Settings) -> None:
    """For ever: abort connections whose client takes too little of what is written (`unread.py`). A transport that was
    closed waits for that client as well."""
    readers = Readers(bounds.send_timeout_s, bounds.unread_bytes, asyncio.get_running_loop().time)
    while True:
        await asyncio.sleep(min(UNREAD_LOOK_EVERY_S, bounds.send_timeout_s / 2))
        found = list(connections)
        slow = set(readers.too_slow(found))
        for connection in found:
            unread_bytes = connection.transport.get_write_buffer_size()
            greedy = isinstance(connection, BoundedStream) and unread_bytes > MOST_UNREAD_BYTES
            if greedy or connection in slow:
                connection.transport.abort()


def own_request_id(offered: str) -> str:
    """What the client calls its request, if that is plain; otherwise one of ours."""
    return offered if _PLAIN_ID.fullmatch(offered) else f"{random.getrandbits(128):032x}"
