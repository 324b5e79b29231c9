"""The end of a connection whose client is still sending (RFC 9112, section 9.6), how much a client has taken, and
answers in one piece.

Closing a socket with bytes unread resets its connection, and a client that has not read yet loses what was written
before: why its upload is refused, why its stream has ended. So we say that nothing more will come and read on for a
while, as nginx does (`lingering_close`).

uvicorn writes an answer's head and body by themselves, and uvloop sends each at once: two system calls, two packets,
and a client woken twice.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

LINGER_S = 2.0
# A whole upload of the largest kind; a client that sends more than that does not listen.
MOST_BYTES = 64 * 1024 * 1024
# What is held back for more to follow it is no more than this.
MOST_HELD_BYTES = 16 * 1024


class Parting(Protocol):
    """What a protocol tells and is told when its connection ends."""

    def hears_more(self) -> bool:
        """Whether the client may be in the middle of saying something."""

    def part(self) -> None:
        """Nothing that is heard or said from here on counts."""

    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class LingeringTransport:
    """A transport whose `close` lets the client hear the last word, that counts what is written, and sends what is
    written in one turn of the event loop in one piece; otherwise the one it is given."""

    def __init__(self, transport: Any, protocol: Parting, *, least_rate: int = 0) -> None:
        """`least_rate`, in bytes a second, is what a client has to take of what is written, whichever protocol writes;
        who looks is `unread.py`."""
        self.least_rate = least_rate
        self._transport = transport
        self._protocol = protocol
        self._parted = False
        self._written_bytes = 0
        self._held: list[bytes] = []
        self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def set_protocol(self, protocol: Parting) -> None:
        self._protocol = protocol
        self._transport.set_protocol(protocol)

    def write(self, data: bytes) -> None:
        if self._parted:
            return
        self._written_bytes += len(data)
        if self._held_bytes + len(data) > MOST_HELD_BYTES:
            self.flush()
            self._transport.write(data)
            return
        if not self._held:
            asyncio.get_running_loop().call_soon(self.flush)
        self._held.append(data)
        self._held_bytes += len(data)

    def flush(self) -> None:
        """Hand on what was written."""
        if not self._held:
            return
        data = b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        if not self._transport.is_closing():
            self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        return self._held_bytes + int(self._transport.get_write_buffer_size())

    @property
    def taken_bytes(self) -> int:
        """Written, and no longer in memory here."""
        return self._written_bytes - self.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._parted or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self.flush()
        if not self._protocol.hears_more() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._parted = True
        self._transport.set_protocol(_Rest(self._transport, self._protocol))
        self._transport.write_eof()
        self._transport.resume_reading()
        self._protocol.part()


class _Rest(asyncio.Protocol):
    """Reads what nobody waits for, until the client has closed, or for `LINGER_S` or `MOST_BYTES`."""

    def __init__(self, transport: Any, before: Parting) -> None:
        self._transport = transport
        self._before = before
        self._bytes = 0
        self._end = asyncio.get_running_loop().call_later(LINGER_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes > MOST_BYTES:
            self._transport.close()

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        self._before.connection_lost(exc)
