"""Connections are taken in all at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Iterator

import pytest
import uvloop

from service import listening
from service.listening import Listener

WAITING = 100


class Counting(asyncio.Protocol):
    """Counts connections."""

    made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: ARG002  asyncio gives it
        Counting.made += 1


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


def run(work: Coroutine[object, object, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def test_all_that_wait_are_taken_in_within_a_few_turns(bound: socket.socket) -> None:
    async def work() -> None:
        Counting.made = 0
        listener = Listener(bound, Counting, backlog=2 * WAITING)
        waiting = [socket.create_connection(bound.getsockname()) for _ in range(WAITING)]
        turns = 0
        while Counting.made < WAITING and turns < WAITING:
            await asyncio.sleep(0)
            turns += 1
        for one in waiting:
            one.close()
        listener.close()
        await listener.wait_closed()
        assert Counting.made == WAITING
        assert turns < WAITING / 5

    run(work())


def test_a_system_that_gives_no_more_is_asked_again_later(
    bound: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PAUSE_S", 0.05)
    failures = [OSError(24, "Too many open files")]

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return super().accept()

    async def work() -> None:
        Counting.made = 0
        listener = Listener(Exhausted(fileno=bound.dup().detach()), Counting, backlog=8)
        with socket.create_connection(bound.getsockname()):
            for _ in range(200):
                await asyncio.sleep(0.01)
                if Counting.made:
                    break
        listener.close()
        assert (failures, Counting.made) == ([], 1)

    run(work())


def test_a_name_is_listened_to_on_each_of_its_addresses_and_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),  # of no machine
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sockets = listening.bind("both", 0)
    names = [one.getsockname() for one in sockets]
    for one in sockets:
        one.close()
    assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
    assert len({name[1] for name in names}) == 1


def test_what_cannot_be_listened_on_is_an_error(bound: socket.socket) -> None:
    bound.listen()
    with pytest.raises(OSError, match="in use"):
        listening.bind("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(OSError, match="assign"):
        listening.bind("192.0.2.1", 0)
