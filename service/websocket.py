"""WebSockets with clients that break the rules, send messages in endless pieces, or go without a word. uvicorn and its
library bound neither. And microphones that send many small messages: the application is woken for those that complete
something (`Gathering`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request

from service.errors import InvalidMessageError

# Pieces of one message. Its bytes are bounded, but pieces may be empty.
MOST_PIECES = 1000
TOO_BIG = 1009
# Messages that are handed on as one, at most: however small they are, the application counts them in time.
MOST_GATHERED = 64
# In a connection's state: its Gathering.
GATHERING = "gathering"


class Gathering:
    """Binary messages that are too little by themselves, until there is enough of them; each waking of an application
    costs as much as reading a message. `deliver` is given what they hold and how many they were."""

    def __init__(self, deliver: Callable[[bytes, int], None]) -> None:
        self._deliver = deliver
        self._parts: list[bytes] = []
        self._bytes = 0
        self._least = 0
        # When the latest came, on the monotonic clock, and how often something was delivered.
        self.heard_at = float("-inf")
        self.delivered = 0

    def add(self, data: bytes) -> None:
        """One message."""
        self.heard_at = time.monotonic()
        self._parts.append(data)
        self._bytes += len(data)
        if len(self._parts) >= MOST_GATHERED:
            self.flush()
        else:
            self.want(self._least)

    def want(self, least: int) -> None:
        """From now on so many bytes are enough."""
        self._least = least
        if self._bytes >= least:
            self.flush()

    def flush(self) -> None:
        """Deliver what there is, if anything."""
        if self._parts:
            count = len(self._parts)
            self.delivered += 1
            self._deliver(self.take(), count)

    def take(self) -> bytes:
        """What there is, which is not delivered any more."""
        data = b"".join(self._parts)
        self._parts.clear()
        self._bytes = 0
        return data


class BoundedStream(WebSocketsSansIOProtocol):
    """A WebSocket whose handshake is answered even where it breaks the rules, and that always comes to an end."""

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        self._gathering = Gathering(self._deliver)
        if self.handshake_initiated and not self.close_sent:
            self.scope["state"][GATHERING] = self._gathering

    def send_receive_event_to_app(self) -> None:
        if self.close_sent:
            # Nobody listens: uvicorn reads on for the client's goodbye.
            super().send_receive_event_to_app()
        elif self.curr_msg_data_type == "bytes":
            data, self.frames = b"".join(self.frames), []
            self._gathering.add(data)
        else:
            # In the order in which they came.
            self._gathering.flush()
            super().send_receive_event_to_app()

    def _deliver(self, data: bytes, messages: int) -> None:
        """As uvicorn does, which knows of one."""
        event: Any = {"type": "websocket.receive", "bytes": data, "messages": messages}
        self.queue.put_nowait(event)
        if not self.read_paused and not self.transport.is_closing():
            self.read_paused = True
            self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # uvicorn looks for a request only, and would keep this connection for ever.
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.handshake_complete = self.close_sent = True
            self.transport.close()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            # A refusal in words ends the handshake as well; uvicorn would log an error.
            self.handshake_complete = True

    def hears_more(self) -> bool:
        return self.conn.close_rcvd is None and self.handshake_initiated

    def part(self) -> None:
        self.writable.set()

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > MOST_PIECES:
            self.conn.fail(TOO_BIG, f"a message of more than {MOST_PIECES} pieces")
            self.handle_parser_exception()

    def handle_parser_exception(self) -> None:
        closing = self.conn.close_sent
        if closing is not None and closing.code == TOO_BIG:
            error = InvalidMessageError(f"the message is too large: {closing.reason}")
            said = json.dumps({"type": "error", "code": error.code, "detail": error.detail})
            self.transport.write(Frame(Opcode.TEXT, said.encode()).serialize(mask=False))
        super().handle_parser_exception()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Answers to pings are written as they are read.
        self.transport.pause_reading()
        self.read_paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.queue.empty() and not self.transport.is_closing():
            self.read_paused = False
            self.transport.resume_reading()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        # The library's complaints about a connection that is half closed must not end the server's own shutdown.
        except Exception:
            self.transport.abort()
