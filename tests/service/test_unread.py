"""Clients that read slowly: what is asked of them, and that they hold up nobody else."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from service.app import create_app
from service.congestion import Congestion
from service.lingering import LingeringTransport
from service.protocol import protocol_for
from service.settings import Settings
from service.unread import Readers
from tests.conftest import RunningService, encoded, start_service, voice
from tests.service.threads import PATIENCE_S, serving, until

PIECE = bytes(2**16)
# More than kernels keep.
PIECES = 512
HELD_BYTES = 1000


class Connection:
    """One with a transport that keeps all until the test takes it."""

    def __init__(self, least_rate: int) -> None:
        self.unread_bytes = 0
        self.transport = LingeringTransport(self, self, least_rate=least_rate)  # type: ignore[arg-type]  # never closed

    def write(self, data: bytes) -> None:
        self.unread_bytes += len(data)

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def is_closing(self) -> bool:
        return False


def cut_after_s(connection: Connection, **rates: int) -> int | None:
    """When a client is cut off that takes so much and is written so much more each second; None where it never is."""

    async def on_a_loop() -> int | None:
        return _cut_after_s(connection, **rates)

    return asyncio.run(on_a_loop())


def _cut_after_s(connection: Connection, *, taken_each_s: int, written_each_s: int, for_s: int = 100) -> int | None:
    now = 0
    readers = Readers(30.0, 10**9, lambda: now)
    connection.transport.write(bytes(100_000))
    for now in range(for_s):
        if list(readers.too_slow([connection])):
            return now
        connection.unread_bytes = max(0, connection.unread_bytes - taken_each_s)
        connection.transport.write(bytes(written_each_s))
    return None


@pytest.mark.parametrize("written_each_s", [0, 500, 5_000])
def test_who_reads_more_slowly_than_the_least_rate_is_cut_off(written_each_s: int) -> None:
    assert cut_after_s(Connection(1000), taken_each_s=900, written_each_s=written_each_s) == 30
    assert cut_after_s(Connection(1000), taken_each_s=1100, written_each_s=written_each_s) is None


def test_without_a_least_rate_any_byte_will_do() -> None:
    assert cut_after_s(Connection(0), taken_each_s=1, written_each_s=0) is None
    assert cut_after_s(Connection(0), taken_each_s=0, written_each_s=1000) == 30


def test_the_last_bytes_have_no_longer_time_than_others() -> None:
    assert cut_after_s(Connection(10_000), taken_each_s=3_300, written_each_s=0, for_s=200) == 30
    assert cut_after_s(Connection(1000), taken_each_s=3_400, written_each_s=0) is None


def test_past_what_all_may_leave_unread_the_first_to_have_had_it_go() -> None:
    now = 0.0
    readers = Readers(30.0, 250_000, lambda: now)
    connections = [Connection(0) for _ in range(4)]

    def cut(*written: int) -> list[int]:
        for index in written:
            connections[index].transport.write(bytes(100_000))
        return [connections.index(one) for one in readers.too_slow(connections)]

    assert cut(0) == []
    now = 1.0
    assert cut(1) == []
    # That it reads all and is written anew makes it the last of the three.
    connections[0].unread_bytes = 0
    assert cut() == []
    now = 2.0
    assert cut(0, 2) == [1]
    # With a fourth, two have to go.
    assert cut(3) == [1, 0]


def test_who_takes_something_now_and_then_has_to_take_enough(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, send_timeout_s="2", least_body_rate=str(2**23))
    started.append(service)
    clip = encoded(voice(110.0))
    head = (
        "POST /v1/embeddings?type=frames HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\n"
        f"Content-Length: {len(clip)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(service.url.rsplit(":", 1)[1])), timeout=PATIENCE_S) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        connection.sendall(head.encode() + clip)
        answer = bytearray()
        # At that pace the kernel, which tells of a megabyte or so together, tells of some within the time.
        while not answer.endswith(b"\r\n0\r\n\r\n") and (part := connection.recv(2**16)):
            answer += part
            time.sleep(len(part) / 1.5e6)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert not answer.endswith(b"\r\n0\r\n\r\n")


async def _long(request: Request) -> StreamingResponse:
    """An upload's worth of memory, and an answer that nobody can have read unasked."""
    runtime = request.app.state.runtime
    runtime.uploads._hold(HELD_BYTES, request.scope["state"])

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(PIECES):
            yield PIECE

    return StreamingResponse(pieces())


class Counted(Congestion):
    begun = 0

    def begin(self) -> None:
        super().begin()
        self.begun += 1

    @property
    def under_way(self) -> int:
        return self._under_way


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[tuple[Counted, int]]:
    settings = Settings(data_dir=tmp_path, inference_threads=1)
    app = create_app(settings)
    app.router.routes.append(Route("/long", _long))
    kind = protocol_for(settings, app.state.runtime.metrics)
    kind.congestion = counted = Counted()
    with serving(app, kind) as (_, port):
        yield counted, port


LONG = b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n"
SHORT = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("behind", [b"", LONG, SHORT])
def test_whose_answer_has_begun_is_no_longer_under_way(crowd: tuple[Counted, int], behind: bytes) -> None:
    """Nor is what waits behind it on the same connection. Its memory counts until the end."""
    counted, port = crowd
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as slow:
        slow.sendall(LONG + behind)
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 ")
        until(lambda: counted.under_way == 0)
        slow.sendall(behind)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as other:
            other.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            told = b"".join(iter(lambda: other.recv(2**16), b""))
        assert b"sotto_upload_bytes %.1f" % HELD_BYTES in told
        assert (counted.under_way, counted.begun) == (0, 2)


def test_what_waits_behind_an_answer_counts_once_its_turn_has_come(crowd: tuple[Counted, int]) -> None:
    counted, port = crowd
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(LONG + SHORT * 3)
        answer = b""
        while answer.count(b'"ok"}') < 3:
            answer = answer[-1000:] + asking.recv(2**20)
    assert (counted.under_way, counted.begun) == (0, 4)
