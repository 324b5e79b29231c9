"""What a stream may ask of the service, and what it gets when the service stops."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service import settings as settings_module
from service.pacing import BURST_S, FURTHEST_AHEAD_S, MESSAGES_PER_S
from service.routes.stream import RESTART
from service.settings import STREAMS_PER_CPU, Settings
from tests.conftest import RunningService, start_service
from tests.service.test_stream import RATE_HZ, detections, listen, pcm, samples_of, url
from tests.service.threads import PATIENCE_S, until

# Frames of the WebSocket protocol, masked with zeros.
CONTROL_PING = bytes([0x89, 0x80 | 125]) + bytes(4) + bytes(125)
PING = b'{"type": "ping"}'
# A message of half a hop.
HOP = RATE_HZ // 4
HALF = bytes([0x82, 0x80 | 126]) + HOP.to_bytes(2, "big") + bytes(4 + HOP)
TEXT_PING = bytes([0x81, 0x80 | len(PING)]) + bytes(4) + PING


def metric(service: RunningService, name: str) -> float:
    line = next(line for line in service.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.rsplit(" ", 1)[1])


def test_only_so_many_messages_a_second_are_heard_however_small(service: RunningService) -> None:
    count = 2 * MESSAGES_PER_S
    with connect(url(service)) as connection:
        begin = time.monotonic()
        for _ in range(count):
            connection.send(bytes(2))
        connection.send('{"type": "end"}')
        messages = listen(connection)
        took_s = time.monotonic() - begin
    assert messages[-1] == {"type": "end", "duration_s": count / RATE_HZ}
    assert took_s >= count / MESSAGES_PER_S - BURST_S - 0.1


def test_only_so_many_messages_a_second_are_read(service: RunningService) -> None:
    count = 2 * MESSAGES_PER_S
    with connect(url(service)) as connection:
        begin = time.monotonic()
        for _ in range(count):
            connection.send(PING.decode())
        connection.send('{"type": "end"}')
        messages = listen(connection)
        took_s = time.monotonic() - begin
    assert [message["type"] for message in messages] == ["ready", *["pong"] * count, "end"]
    assert took_s >= count / MESSAGES_PER_S - BURST_S - 0.1


def test_a_stream_that_reads_nothing_is_ended(tmp_path: Path, started: list[RunningService]) -> None:
    """Though it goes on talking, and is given more time by all else."""
    service = start_service(tmp_path, stream_send_timeout_s="0.5", send_timeout_s="300", stream_idle_s="300")
    started.append(service)
    port = int(service.url.rsplit(":", 1)[1])
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(
            b"GET /v1/keywords/stream HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        until(lambda: metric(service, "sotto_streams") == 1)
        deaf.settimeout(0.2)

        # Answered as they are read, but for the last of each hundred, which the stream answers in its turn.
        block = 20 * (100 * CONTROL_PING + TEXT_PING)
        rest = b""

        def over() -> bool:
            nonlocal rest
            rest = rest or block
            with contextlib.suppress(TimeoutError):
                rest = rest[deaf.send(rest) :]
            return metric(service, "sotto_streams") == 0

        until(over)
    assert metric(service, 'sotto_rejects_total{reason="deadline_exceeded"}') == 1


def test_a_stream_that_is_not_read_for_now_is_told_what_was_heard_when_the_service_stops(
    tmp_path: Path, started: list[RunningService]
) -> None:
    service = start_service(tmp_path)
    started.append(service)
    word = samples_of("computer.wav")
    # Two messages of whole hops: further ahead than a stream is read, with a word at the end.
    heard = np.zeros(64 * HOP, np.float32)
    heard[-RATE_HZ - len(word) : -RATE_HZ] = word
    audio = pcm(heard)
    assert len(heard) / RATE_HZ - FURTHEST_AHEAD_S > 5
    with connect(url(service)) as connection:
        assert json.loads(connection.recv(timeout=PATIENCE_S))["type"] == "ready"
        connection.send(audio[: 64 * HOP])
        connection.send(audio[64 * HOP :])
        assert json.loads(connection.recv(timeout=PATIENCE_S))["keyword"] == "en:computer"
        # From here on it waits for the clock.
        until(lambda: metric(service, "sotto_stream_delay_seconds_count") == 2)
        # Not read: what makes three hops, and too little for a fourth, which must not be told as if it followed.
        connection.socket.sendall(7 * HALF)
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        *rest, end = listen(connection)
    assert detections(rest) == []
    assert end == {"type": "end", "duration_s": pytest.approx(len(heard) / RATE_HZ, abs=0.001)}
    assert connection.close_code == RESTART
    assert service.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("cpus", "connections", "streams"), [(1, 1000, STREAMS_PER_CPU), (2, 1000, 300), (64, 1000, 500), (2, 1, 1)]
)
def test_a_machine_has_as_many_streams_as_it_can_hear(
    monkeypatch: pytest.MonkeyPatch, cpus: int, connections: int, streams: int
) -> None:
    monkeypatch.setattr(settings_module, "available_cpus", lambda: cpus)
    monkeypatch.setenv("SOTTO_LIMIT_CONNECTIONS", str(connections))
    assert Settings().max_streams == streams
    monkeypatch.setenv("SOTTO_MAX_STREAMS", "7")
    assert Settings().max_streams == 7


def test_streams_can_be_forbidden(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, max_streams="0")
    started.append(service)
    with pytest.raises(InvalidStatus) as refused, connect(url(service)):
        pass
    assert refused.value.response.status_code == 503
