"""Requests whose turn would come too late are turned away at their head, and nothing else is."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.congestion import FEW, SHARE, STALE_S, Congestion
from service.protocol import MOST_UNWANTED_BYTES, BoundedHttp, protocol_for
from service.settings import Settings
from tests.conftest import encoded, voice
from tests.service.threads import PATIENCE_S, serving, until

DETECT = "/v1/keywords/detect"
CLIP = encoded(voice(1.0))
WAV = {"Content-Type": "audio/wav"}
KEEP_ALIVE_S = 1


class Clock:
    """Moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def crowd(clock: Clock, *, under_way: int, answers: int, each_s: float) -> Congestion:
    """After so many answers, so far apart, with always as many under way."""
    congestion = Congestion(clock)
    for _ in range(under_way):
        congestion.begin()
    for _ in range(answers):
        congestion.begin()
        clock.now += each_s
        congestion.end()
    return congestion


def test_the_wait_is_what_is_under_way_at_the_pace_of_answers() -> None:
    found = crowd(Clock(), under_way=200, answers=1000, each_s=0.01)
    assert found.wait_s == pytest.approx(200 * 0.01, rel=0.01)


def test_few_requests_wait_for_nothing_however_slow_they_are() -> None:
    assert crowd(Clock(), under_way=FEW - 2, answers=1000, each_s=1.0).wait_s == 0


def test_one_stall_is_forgotten_by_answers_at_the_old_pace() -> None:
    clock = Clock()
    found = crowd(clock, under_way=FEW, answers=1000, each_s=0.001)
    clock.now += 60
    for _ in range(1000):
        found.end()
        clock.now += 0.001
        found.begin()
    assert found.wait_s == pytest.approx(FEW * 0.001, rel=0.05)


def test_a_quiet_time_is_no_slow_answer() -> None:
    clock = Clock()
    found = crowd(clock, under_way=FEW, answers=1000, each_s=0.001)
    for _ in range(FEW):
        found.end()
    clock.now += 3600
    for _ in range(FEW + 1):
        found.begin()
    found.end()
    assert found.wait_s == pytest.approx(FEW * 0.001, rel=0.05)


def test_a_pace_that_no_answer_confirms_is_forgotten() -> None:
    """Where refusals are all that a crowd of held requests hears, nothing else would end them."""
    clock = Clock()
    found = crowd(clock, under_way=FEW, answers=1000, each_s=0.1)
    before_s = found.wait_s
    assert before_s == pytest.approx(FEW * 0.1, rel=0.01)
    clock.now += STALE_S
    assert found.wait_s == before_s, "they may still be answered"
    clock.now += 3 * STALE_S
    assert found.wait_s == pytest.approx(before_s / 8)
    # And learnt anew from there.
    found.end()
    found.begin()
    assert found.wait_s < before_s / 4


def test_the_next_crowd_has_its_own_time_to_be_answered() -> None:
    clock = Clock()
    found = crowd(clock, under_way=FEW, answers=1000, each_s=0.1)
    found.end()
    clock.now += 3600
    found.begin()
    wait_s = found.wait_s
    assert wait_s == pytest.approx(FEW * 0.1, rel=0.05)
    clock.now += 3 * STALE_S
    assert found.wait_s == pytest.approx(wait_s / 4)


class Loop:
    """An event loop's `call_soon`, turned by hand."""

    def __init__(self) -> None:
        self._next: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def __call__(self, call: Callable[..., object], *arguments: object) -> None:
        self._next.append((call, arguments))

    def turn(self) -> None:
        due, self._next = self._next, []
        for call, arguments in due:
            call(*arguments)


def test_what_the_loop_has_not_read_yet_waits_as_long_as_its_turns_take() -> None:
    clock, loop = Clock(), Loop()
    found = crowd(clock, under_way=200, answers=1000, each_s=0.001)
    own_s = found.wait_s
    for _ in range(3):
        # Heads are read, what is ready runs, and that again.
        for _ in range(10):
            found.hear(loop)
            clock.now += 0.02
        loop.turn()
        clock.now += 0.3
    assert found.wait_s - own_s == pytest.approx(0.7, abs=0.05), "0.5, and until the next heads are read"
    found.hear(loop)
    clock.now += 0.9
    assert found.wait_s - own_s == pytest.approx(1.4, abs=0.05), "this turn is longer already"


def test_a_long_turn_says_nothing_of_those_after_a_pause() -> None:
    clock, loop = Clock(), Loop()
    found = crowd(clock, under_way=FEW, answers=1000, each_s=0.001)
    found.hear(loop)
    loop.turn()
    clock.now += 0.5
    loop.turn()
    assert found.wait_s > 0.5
    clock.now += 2.0
    found.hear(loop)
    assert found.wait_s == pytest.approx(FEW * 0.001, rel=0.1)


def test_few_requests_are_not_too_many_however_long_turns_are() -> None:
    clock, loop = Clock(), Loop()
    found = crowd(clock, under_way=FEW - 2, answers=1000, each_s=0.001)
    found.hear(loop)
    clock.now += 5.0
    assert found.wait_s == 0.0


class Crowded(Congestion):
    """Says what it is told to say, and counts as ever."""

    told_s = 0.0
    begun = 0
    most = 0

    def begin(self) -> None:
        super().begin()
        self.begun += 1
        self.most = max(self.most, self.under_way)

    @property
    def wait_s(self) -> float:
        return self.told_s

    @property
    def under_way(self) -> int:
        return self._under_way


def to_its_end(asking: socket.socket) -> bytes:
    """All that is answered until the service closes the connection."""
    return b"".join(iter(lambda: asking.recv(2**16), b""))


@pytest.fixture
def http(tmp_path: Path) -> Iterator[tuple[type[BoundedHttp], Crowded, int]]:
    app = create_app(Settings(data_dir=tmp_path, inference_threads=1, request_timeout_s=10.0))
    kind = protocol_for(Settings(data_dir=tmp_path, request_timeout_s=10.0), app.state.runtime.metrics)
    kind.congestion = crowded = Crowded()
    with serving(app, kind, keep_alive_s=KEEP_ALIVE_S) as (_, port):
        yield kind, crowded, port


def test_who_has_time_is_answered_and_who_has_not_is_told_when_to_come_again(
    http: tuple[type[BoundedHttp], Crowded, int],
) -> None:
    _, crowded, port = http
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        crowded.told_s = 10.0 * SHARE - 0.1
        assert client.post(DETECT, content=CLIP, headers=WAV).status_code == 200
        hasty = {**WAV, "X-Request-Timeout-Ms": "1000", "X-Request-ID": "mine"}
        ports = []
        for _ in range(3):
            refused = client.post(DETECT, content=CLIP, headers=hasty)
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert refused.json()["instance"] == DETECT
            assert int(refused.headers["retry-after"]) == 3
            assert refused.headers["x-request-id"] == "mine"
            ports.append(refused.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(set(ports)) == 1, "the connection is kept"
        assert client.post(DETECT, content=CLIP, headers=WAV).status_code == 200
        crowded.told_s = 10.0 * SHARE + 0.1
        assert client.post(DETECT, content=CLIP, headers=WAV).status_code == 503
        for path in ("/healthz", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        metrics = client.get("/metrics").text
        assert 'sotto_rejects_total{reason="overloaded"} 4.0' in metrics
        turned_away = '{method="POST",route="unmatched",status="503"}'
        assert f"sotto_request_duration_seconds_count{turned_away} 4.0" in metrics


@pytest.mark.parametrize(
    "head",
    [
        f"Content-Length: {MOST_UNWANTED_BYTES + 1}\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nExpect: 100-continue\r\n",
        "Content-Length: 5\r\nConnection: close\r\n",
    ],
)
def test_what_need_not_be_read_to_its_end_is_not(http: tuple[type[BoundedHttp], Crowded, int], head: str) -> None:
    _, crowded, port = http
    crowded.told_s = 60.0
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(f"POST {DETECT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
        answer = to_its_end(asking)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_the_body_of_what_was_turned_away_does_not_become_a_request(
    http: tuple[type[BoundedHttp], Crowded, int],
) -> None:
    _, crowded, port = http
    crowded.told_s = 60.0
    inner = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = f"POST {DETECT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(head)
        answer = asking.recv(2**16)
        asking.sendall(inner)
        asking.sendall(b"GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer += asking.recv(2**16)
    assert answer.count(b"HTTP/1.1 503 ") == answer.count(b"HTTP/1.1 ") == 2


def test_what_is_under_way_is_counted_until_it_is_answered_or_its_client_left(
    http: tuple[type[BoundedHttp], Crowded, int],
) -> None:
    _, crowded, port = http
    head = (
        f"POST {DETECT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\nContent-Length: {len(CLIP)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(head.encode() + CLIP[:-1])
        asking.sendall(CLIP[-1:])
        asking.recv(2**16)
        # Answered at its head, so never a whole request under way.
        asking.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        assert asking.recv(2**16).startswith(b"HTTP/1.1 404")
        asking.sendall(b"12345")
        assert crowded.begun == 1
        # As many as one likes in one piece are one connection's.
        asking.sendall(head.encode() + CLIP + b"GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        assert asking.recv(1)
    until(lambda: crowded.under_way == 0)
    assert crowded.most == 1


@pytest.mark.parametrize(
    "handshake", ["", "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"]
)
def test_a_stream_behind_an_unanswered_request_is_closed_and_counted_out(
    http: tuple[type[BoundedHttp], Crowded, int], handshake: str
) -> None:
    _, crowded, port = http
    first = "GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\n\r\n"
    upgrade = (
        "GET /v1/keywords/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"{handshake}\r\n"
    )
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
            asking.sendall((first + upgrade).encode())
            to_its_end(asking)
    until(lambda: crowded.under_way == 0)
    assert crowded.begun == 3


def test_who_is_turned_away_and_sends_an_empty_line_is_not_kept_for_ever(
    http: tuple[type[BoundedHttp], Crowded, int],
) -> None:
    _, crowded, port = http
    crowded.told_s = 60.0
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(b"GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asking.recv(2**16).startswith(b"HTTP/1.1 503")
        asking.sendall(b"\r\n")
        assert asking.recv(2**16) == b""


def test_a_request_behind_one_that_was_turned_away_is_not_cut_off(http: tuple[type[BoundedHttp], Crowded, int]) -> None:
    """By the timer that waited for it."""
    _, crowded, port = http
    crowded.told_s = 60.0
    away = b"GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\n\r\n"
    slow = (
        b"POST /v1/keywords/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\nContent-Length: %d\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(away + away)
        answer = b""
        while answer.count(b"HTTP/1.1 503") < 2:
            answer += asking.recv(2**16)
        crowded.told_s = 0.0
        asking.sendall(slow % len(CLIP))
        time.sleep(1.5 * KEEP_ALIVE_S)
        asking.sendall(CLIP)
        assert asking.recv(2**16).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_is_not_answered_again_and_again(http: tuple[type[BoundedHttp], Crowded, int]) -> None:
    _, crowded, port = http
    crowded.told_s = 60.0
    with socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.connect(("127.0.0.1", port))
        asking.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                asking.sendall(b"GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
            to_its_end(asking)
        assert crowded.begun == 0


def test_a_request_behind_a_refusal_that_closes_is_not_carried_out(
    http: tuple[type[BoundedHttp], Crowded, int],
) -> None:
    _, crowded, port = http
    crowded.told_s = 60.0
    last = b"GET /v1/keywords HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asking:
        asking.sendall(last + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = to_its_end(asking)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert crowded.begun == 0
