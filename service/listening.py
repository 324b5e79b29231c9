"""Takes connections in.

uvloop takes one connection for each turn of its loop (libuv does so since 1.45). Under load a turn is long, so new ones
wait for many seconds while those that are open are served, and probes, which open one each, fail. Here everything that
waits is taken at once; what there is no time for is then turned away at little cost (`congestion.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence

# Of one turn, lest taking them in hold up what is open.
ACCEPTED_AT_ONCE = 512
# After the system could give no more: open files, memory.
PAUSE_S = 1.0

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that `host` has here, as `localhost` may have two; port 0 is a free one, of the first.
    Raises OSError where one is taken, or none can be had."""
    sockets: list[socket.socket] = []
    failure = OSError(f"{host!r} has no address here")
    for family, kind, protocol, _, address in dict.fromkeys(
        socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    ):
        own = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
        made = None
        try:
            made = socket.socket(family, kind, protocol)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(own)
        except OSError as error:
            if made is not None:
                made.close()
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for one in sockets:
                    one.close()
                raise
            failure = error
            continue
        sockets.append(made)
    if not sockets:
        raise failure
    return sockets


class Listener:
    """What uvicorn needs of an asyncio server, around one bound socket."""

    def __init__(self, bound: socket.socket, make_protocol: Callable[[], asyncio.Protocol], backlog: int) -> None:
        self._bound = bound
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._paused: asyncio.TimerHandle | None = None
        # A task that nobody holds may be collected before it is done.
        self._opening: set[asyncio.Task[object]] = set()
        bound.setblocking(False)
        bound.listen(backlog)
        self._loop.add_reader(bound, self._accept)

    @property
    def sockets(self) -> Sequence[socket.socket]:
        return [self._bound]

    def close(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._bound)
        self._bound.close()

    async def wait_closed(self) -> None:
        """Connections are the server's own to wait for."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, _ = self._bound.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError:
                log.exception("connections cannot be taken in; trying again in %g s", PAUSE_S)
                self._loop.remove_reader(self._bound)
                self._paused = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._bound, self._accept)
                return
            connection.setblocking(False)
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            # It was gone before it was ours.
            connection.close()
