"""WebSockets with clients that break the rules, send messages in endless pieces, or go without a word. uvicorn and its
library bound neither."""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

from service.errors import InvalidMessageError

# Pieces of one message. Its bytes are bounded, but pieces may be empty.
MOST_PIECES = 1000
TOO_BIG = 1009


class BoundedStream(WebSocketsSansIOProtocol):
    """A WebSocket whose handshake is answered even where it breaks the rules, and that always comes to an end."""

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
