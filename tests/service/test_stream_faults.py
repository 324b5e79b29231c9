"""Faults in the streaming graph of a running service: whose chunk was in the call is told, others go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from model_store.streaming import StreamingGraph
from service.app import create_app
from service.protocol import protocol_for
from service.routes.stream import INTERNAL
from service.runtime import Runtime
from service.settings import Settings
from tests.service.faults import Faults
from tests.service.test_stream import STREAM, detections, listen, pcm, samples_of
from tests.service.threads import PATIENCE_S, serving, until

CALL_TIMEOUT_S = 1.0
MESSAGE_S = 0.25
# Two seconds, in the middle of which a word is said.
WORD = pcm(samples_of("computer.wav"))
MESSAGE_BYTES = int(MESSAGE_S * 32_000)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    made = Faults()
    run = StreamingGraph.run

    def faulty(self: StreamingGraph, *arguments: Any) -> object:
        made.now()
        return run(self, *arguments)

    monkeypatch.setattr(StreamingGraph, "run", faulty)
    yield made
    made.go_on.set()


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[tuple[Runtime, str]]:
    """A service in this process, and the address of its streams."""
    app = create_app(Settings(data_dir=folder, inference_threads=1, **settings))
    with serving(app, protocol_for(app.state.runtime.settings, app.state.runtime.metrics)) as (_, port):
        yield app.state.runtime, f"ws://127.0.0.1:{port}{STREAM}"


def value(runtime: Runtime, name: str, **labels: str) -> float:
    return runtime.metrics.registry.get_sample_value(name, labels) or 0.0


def to_its_end(connection: ClientConnection, data: bytes) -> list[dict[str, Any]]:
    for start in range(0, len(data), MESSAGE_BYTES):
        connection.send(data[start : start + MESSAGE_BYTES])
    connection.send('{"type": "end"}')
    return listen(connection)


@pytest.mark.parametrize(("fault", "kind"), [("fail", "call"), ("hang", "hang"), ("die", "restart")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_whose_call_fails_is_told_and_others_go_on(
    tmp_path: Path, faults: Faults, fault: str, kind: str
) -> None:
    half = len(WORD) // 2
    with running(tmp_path, call_timeout_s=CALL_TIMEOUT_S) as (runtime, url):
        with connect(url) as other, connect(url) as unlucky:
            other.send(WORD[:half])
            # Heard, so that the fault is not in its call.
            until(lambda: value(runtime, "sotto_stream_delay_seconds_count") == 1)
            faults.once(fault)
            unlucky.send(WORD)
            *_, last = listen(unlucky)
            assert (last["type"], last["code"]) == ("error", "inference_failed")
            assert "no room" not in last["detail"]
            assert unlucky.close_code == INTERNAL
            # Its worker is replaced.
            until(lambda: value(runtime, "sotto_worker_failures_total", kind=kind) == 1)
            messages = to_its_end(other, WORD[half:])
            assert [event["keyword"] for event in detections(messages)] == ["en:computer"]
            assert (messages[-1]["type"], other.close_code) == ("end", 1000)
        with connect(url) as next_one:
            assert to_its_end(next_one, WORD)[-1]["type"] == "end"
        assert value(runtime, "sotto_rejects_total", reason="inference_failed") == 1
        until(lambda: len(runtime.streams) == 0)


def test_what_follows_the_graph_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("service.streaming.FrameStream.settle", broken)
    with running(tmp_path) as (runtime, url):
        with connect(url) as connection:
            *_, last = to_its_end(connection, WORD)
        assert (last["type"], last["code"]) == ("error", "internal_error")
        assert connection.close_code == INTERNAL
        until(lambda: len(runtime.streams) == 0)


def test_audio_that_waits_for_a_call_before_shows_in_the_delay(tmp_path: Path, faults: Faults) -> None:
    with running(tmp_path) as (runtime, url), connect(url) as connection:
        faults.once("hang")
        connection.send(bytes(MESSAGE_BYTES))
        assert faults.entered.acquire(timeout=PATIENCE_S)
        came = time.monotonic()
        for _ in range(3):
            connection.send(bytes(MESSAGE_BYTES))
        until(lambda: time.monotonic() - came >= 4 * MESSAGE_S)
        held_s = time.monotonic() - came
        faults.go_on.set()
        until(lambda: value(runtime, "sotto_stream_delay_seconds_count") == 4)
        # Three messages after the first, each said 0.25 s after the one before it.
        assert value(runtime, "sotto_stream_delay_seconds_sum") >= 4 * held_s - (1 + 2 + 3) * MESSAGE_S
