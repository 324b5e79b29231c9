"""Faults put into each stage of a running service: what was in flight is answered, it is counted, and the next request
is served."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from service import audio
from service.app import create_app
from service.batching import FAILING_CALLS
from service.engine import Engine
from service.models import Models
from service.protocol import protocol_for
from service.runtime import Runtime
from service.settings import Settings
from tests.conftest import LOCAL, encoded, voice
from tests.service.faults import Faults
from tests.service.threads import PATIENCE_S, serving, until

DETECT = "/v1/keywords/detect"
WAV = {"Content-Type": "audio/wav"}
CLIP = encoded(voice(1.0))
# Too large to be decoded on the event loop.
LONG = encoded(voice(3.0))
CALL_TIMEOUT_S = 1.0


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    made = Faults()
    run = Engine.run

    def faulty(self: Engine, *arguments: object, **options: object) -> object:
        made.calls += 1
        made.now()
        return run(self, *arguments, **options)

    monkeypatch.setattr(Engine, "run", faulty)
    yield made
    made.go_on.set()


@pytest.fixture
def client(tmp_path: Path, faults: Faults) -> Iterator[TestClient]:
    assert faults.calls == 0
    settings = Settings(
        data_dir=tmp_path, inference_threads=1, decode_threads=1, call_timeout_s=CALL_TIMEOUT_S, request_timeout_s=30
    )
    with TestClient(create_app(settings), LOCAL) as made:
        yield made


def detect(client: TestClient, clip: bytes = CLIP) -> httpx.Response:
    return client.post(DETECT, content=clip, headers=WAV)


def metric(client: TestClient, name: str) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith(name))
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize(("fault", "kind"), [("fail", "call"), ("die", "restart")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_graph_call_that_fails_or_takes_its_worker_along(
    client: TestClient, faults: Faults, fault: str, kind: str
) -> None:
    faults.now = getattr(faults, fault)
    failed = detect(client)
    assert (failed.status_code, failed.json()["code"]) == (500, "inference_failed")
    assert "no room" not in failed.text
    faults.now = lambda: None
    until(lambda: metric(client, f'sotto_worker_failures_total{{kind="{kind}"}}') == 1)
    assert detect(client).status_code == 200
    until(lambda: client.get("/readyz").status_code == 200)


def test_a_graph_call_that_hangs(client: TestClient, faults: Faults) -> None:
    faults.now = faults.hang
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(detect(client)))
    asking.start()
    assert faults.entered.acquire(timeout=PATIENCE_S)
    faults.now = lambda: None
    asking.join(PATIENCE_S)
    assert (answers[0].status_code, answers[0].json()["code"]) == (500, "inference_failed")
    assert metric(client, 'sotto_worker_failures_total{kind="hang"}') == 1
    assert detect(client).status_code == 200
    # For a while, so that whoever routes requests notices.
    assert client.get("/readyz").json()["checks"]["inference"] is False
    until(lambda: client.get("/readyz").status_code == 200)


def test_graph_calls_that_all_fail(client: TestClient, faults: Faults) -> None:
    faults.now = faults.fail
    checks = []
    for _ in range(FAILING_CALLS):
        assert detect(client).status_code == 500
        checks.append(client.get("/readyz").json()["checks"]["inference"])
    assert checks == [True] * (FAILING_CALLS - 1) + [False]
    assert client.get("/healthz").status_code == 200
    faults.now = lambda: None
    assert detect(client).status_code == 200
    assert client.get("/readyz").status_code == 200


def test_a_decoder_that_hangs(client: TestClient, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, hangs = audio.decode, [True]

    def hanging(*arguments: Any, **options: Any) -> audio.Waveform:
        if hangs.pop():
            faults.hang()
        return decode(*arguments, **options)

    monkeypatch.setattr(audio, "decode", hanging)
    failed = detect(client, LONG)
    assert (failed.status_code, failed.json()["code"]) == (500, "internal_error")
    assert metric(client, 'sotto_worker_failures_total{kind="decode"}') == 1
    monkeypatch.undo()
    # The one thread there was is still in its call, and stays in it when the service ends.
    assert detect(client, LONG).status_code == 200
    assert client.get("/readyz").json()["checks"]["decoding"] is False
    until(lambda: client.get("/readyz").status_code == 200)


def test_a_model_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, cancelled = [], []

    async def hanging(_: Models) -> None:
        begun.append(True)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(Models, "refresh", hanging)
    settings = Settings(data_dir=tmp_path, inference_threads=1, models_refresh_s=0.01)
    with TestClient(create_app(settings), LOCAL) as client:
        until(lambda: bool(begun))
        rounds = metric(client, "sotto_event_loop_lag_seconds_count")
        until(lambda: metric(client, "sotto_event_loop_lag_seconds_count") > rounds + 1)
        assert begun == [True]
    assert cancelled == [True]


def test_a_decoder_that_fails(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> audio.Waveform:
        raise OSError("the library is gone")

    monkeypatch.setattr(audio, "decode", broken)
    failed = detect(client)
    assert (failed.status_code, failed.json()["code"]) == (500, "internal_error")
    assert "library" not in failed.text
    monkeypatch.undo()
    assert detect(client).status_code == 200


def test_what_follows_the_graph_fails(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("service.keywords.weigh", broken)
    assert detect(client).json()["code"] == "internal_error"
    monkeypatch.undo()
    assert detect(client).status_code == 200


def test_the_clip_of_a_client_that_left_is_not_computed(tmp_path: Path, faults: Faults) -> None:
    settings = Settings(data_dir=tmp_path, inference_threads=1, max_batch=1)
    app = create_app(settings)
    with serving(app, protocol_for(settings, app.state.runtime.metrics)) as (server, port):
        base = f"http://127.0.0.1:{port}"
        faults.now = faults.hang
        first: list[int] = []
        asking = threading.Thread(
            target=lambda: first.append(httpx.post(base + DETECT, content=CLIP, headers=WAV, timeout=30).status_code)
        )
        asking.start()
        assert faults.entered.acquire(timeout=PATIENCE_S)
        faults.now = lambda: None
        head = (
            f"POST {DETECT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\n"
            f"Content-Length: {len(CLIP)}\r\n\r\n"
        )
        runtime: Runtime = app.state.runtime
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(head.encode() + CLIP)
            until(lambda: runtime.metrics.queue_depth._value.get() == 1)
        calls = faults.calls
        # Until the service has noticed, which takes a turn of its loop.
        until(lambda: len(server.server_state.connections) <= 1)
        faults.go_on.set()
        asking.join(PATIENCE_S)
        dropped = 'sotto_dropped_total{reason="abandoned"} 1.0'
        until(lambda: dropped in httpx.get(base + "/metrics").text)
        assert first == [200]
        assert faults.calls == calls
