"""`WS /v1/keywords/stream`: what a microphone gets back, and what a stranger does."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from websockets.asyncio.client import connect as connect_later
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from model_store import KeywordInfo, LocalStore
from service.auth import hash_key
from service.keywords import Array, allowed_labels
from service.streaming import Pace, Spotter, Window, WindowStream
from tests.conftest import REPOSITORY, RunningService, Samples, start_service, voice

STREAM = "/v1/keywords/stream"
EXAMPLES = REPOSITORY / "examples"
RATE_HZ = 16_000
MICROPHONE_BYTES = 640  # 20 ms
PATIENCE_S = 60.0

Event = dict[str, Any]


def samples_of(name: str) -> Samples:
    samples, rate_hz = soundfile.read(EXAMPLES / name, dtype="float32")
    return np.asarray(soxr.resample(samples, rate_hz, RATE_HZ))


def pcm(samples: Samples) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def url(service: RunningService, query: str = "") -> str:
    return service.url.replace("http", "ws") + STREAM + query


def listen(connection: ClientConnection) -> list[Event]:
    """All messages until the connection closes."""
    messages = []
    while True:
        try:
            messages.append(json.loads(connection.recv(timeout=PATIENCE_S)))
        except ConnectionClosed:
            return messages


def spoken(service: RunningService, data: bytes, *, query: str = "", size: int = MICROPHONE_BYTES) -> list[Event]:
    with connect(url(service, query)) as connection:
        for start in range(0, len(data), size):
            connection.send(data[start : start + size])
        connection.send('{"type": "end"}')
        return listen(connection)


def detections(messages: list[Event]) -> list[Event]:
    return [message for message in messages if message["type"] == "detection"]


@pytest.mark.parametrize("name", ["computer.wav", "five-words.wav"])
@pytest.mark.parametrize("size", [MICROPHONE_BYTES, 777, 60_000])
def test_a_stream_finds_what_the_clip_holds(service: RunningService, name: str, size: int) -> None:
    clip = service.post("/v1/keywords/detect", (EXAMPLES / name).read_bytes()).json()
    messages = spoken(service, pcm(samples_of(name)), size=size)
    assert messages[0]["type"] == "ready"
    assert messages[0]["model"] == clip["model"]
    assert messages[-1] == {"type": "end", "duration_s": pytest.approx(clip["duration_s"], abs=0.001)}
    found = detections(messages)
    assert [event["keyword"] for event in found] == [event["keyword"] for event in clip["detections"]]
    for event, whole in zip(found, clip["detections"], strict=True):
        assert event["start_s"] < whole["end_s"]
        assert whole["start_s"] < event["end_s"]


def test_other_rates_are_resampled(service: RunningService) -> None:
    data = pcm(soxr.resample(samples_of("computer.wav"), RATE_HZ, 44_100))
    messages = spoken(service, data, query="?rate=44100")
    assert [event["keyword"] for event in detections(messages)] == ["en:computer"]
    assert messages[0]["rate"] == 44_100


def test_only_the_words_asked_for_are_told(service: RunningService) -> None:
    data = pcm(samples_of("five-words.wav"))
    found = detections(spoken(service, data, query="?keywords=en:computer&keywords=en:jarvis"))
    assert [event["keyword"] for event in found] == ["en:computer", "en:jarvis"]
    assert detections(spoken(service, data, query="?threshold=1")) == []


def test_a_word_is_told_while_the_stream_goes_on(service: RunningService) -> None:
    with connect(url(service)) as connection:
        data = pcm(np.concatenate([samples_of("computer.wav"), np.zeros(RATE_HZ, np.float32)]))
        for start in range(0, len(data), MICROPHONE_BYTES):
            connection.send(data[start : start + MICROPHONE_BYTES])
        assert json.loads(connection.recv(timeout=PATIENCE_S))["type"] == "ready"
        assert json.loads(connection.recv(timeout=PATIENCE_S))["keyword"] == "en:computer"
        connection.send('{"type": "ping"}')
        assert json.loads(connection.recv(timeout=PATIENCE_S)) == {"type": "pong"}


def test_many_streams_at_once_equal_each_alone(service: RunningService) -> None:
    words = samples_of("five-words.wav")
    rng = np.random.default_rng(0)
    spoken_by = [
        pcm(
            np.roll(words, int(rng.integers(len(words)))) * rng.uniform(0.2, 1.0)
            + voice(len(words) / RATE_HZ, seed=seed)
        )
        for seed in range(64)
    ]

    async def one(data: bytes) -> list[Event]:
        async with connect_later(url(service)) as connection:
            for start in range(0, len(data), 16_000):
                await connection.send(data[start : start + 16_000])
            await connection.send('{"type": "end"}')
            return [json.loads(message) async for message in connection]

    async def together() -> list[list[Event]]:
        return await asyncio.gather(*(one(data) for data in spoken_by))

    found = asyncio.run(together())
    alone = [asyncio.run(one(data)) for data in spoken_by]
    assert any(detections(messages) for messages in found)
    for messages, own in zip(found, alone, strict=True):
        assert len(messages) == len(own)
        for message, same in zip(messages, own, strict=True):
            # A score may differ in its last digit: other neighbours, another order of sums.
            assert {**message, "score": 0} == {**same, "score": 0}
            assert message.get("score", 0) == pytest.approx(same.get("score", 0), abs=2e-4)


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("?rate=100", 422, "invalid_request"),
        ("?rate=fast", 422, "invalid_request"),
        ("?rte=16000", 422, "invalid_request"),
        ("?keywords=en:nothing", 404, "not_found"),
        ("?model=nobody", 404, "not_found"),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused_before_it_opens(
    service: RunningService, query: str, status: int, code: str
) -> None:
    with pytest.raises(InvalidStatus) as refused, connect(url(service, query)):
        pass
    response = refused.value.response
    assert (response.status_code, json.loads(response.body)["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("text", ["hello", "{}", "[]", '{"type": "start"}', "[" * 5000])
def test_a_text_that_means_nothing_ends_the_stream(service: RunningService, text: str) -> None:
    with connect(url(service)) as connection:
        connection.send(text)
        last = listen(connection)[-1]
    assert (last["type"], last["code"]) == ("error", "invalid_message")
    assert connection.close_code == 1003


@pytest.mark.parametrize("size", [2**18 + 2, 2**21])
def test_a_message_too_large_ends_the_stream(service: RunningService, size: int) -> None:
    with connect(url(service)) as connection:
        connection.send(bytes(size))
        last = listen(connection)[-1]
    assert (last["type"], last["code"]) == ("error", "invalid_message")
    assert "too large" in last["detail"]
    assert connection.close_code == 1009


@pytest.mark.parametrize(("path", "status", "code"), [
    ("/v1/keywords/stream?rate=1", 422, "invalid_request"), ("/v1/nothing", 404, "not_found"),
    ("/healthz", 404, "not_found"),
])  # fmt: skip
def test_a_refusal_is_a_problem_and_no_failure(service: RunningService, path: str, status: int, code: str) -> None:
    before = service.log.read_text()
    with pytest.raises(InvalidStatus) as refused, connect(service.url.replace("http", "ws") + path):
        pass
    response = refused.value.response
    assert (response.status_code, json.loads(response.body)["code"]) == (status, code)
    assert response.headers["x-request-id"]
    service.get("/healthz")
    assert "Traceback" not in service.log.read_text().removeprefix(before)


def test_without_keys_pages_of_other_origins_are_refused(service: RunningService) -> None:
    with pytest.raises(InvalidStatus) as refused, connect(url(service), origin="http://elsewhere.example"):
        pass
    assert refused.value.response.status_code == 403
    with connect(url(service), origin=service.url) as connection:
        assert json.loads(connection.recv(timeout=PATIENCE_S))["type"] == "ready"


def test_only_so_many_streams_at_once(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, max_streams="1")
    started.append(service)
    with connect(url(service)), pytest.raises(InvalidStatus) as refused, connect(url(service)):
        pass
    assert refused.value.response.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_an_idle_stream_is_ended(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, stream_idle_s="0.3")
    started.append(service)
    with connect(url(service)) as connection:
        last = listen(connection)[-1]
    assert (last["code"], connection.close_code) == ("stream_idle", 1008)


@pytest.mark.parametrize(("sign", "answers"), [('{"type": "ping"}', ["pong"] * 6), (bytes(2), [])])
def test_a_stream_with_a_sign_of_life_now_and_then_is_not_idle(
    tmp_path: Path, started: list[RunningService], sign: str | bytes, answers: list[str]
) -> None:
    service = start_service(tmp_path, stream_idle_s="1.5")
    started.append(service)
    with connect(url(service)) as connection:
        for _ in range(6):
            time.sleep(0.5)
            connection.send(sign)
        connection.send('{"type": "end"}')
        said = listen(connection)
    assert [message["type"] for message in said] == ["ready", *answers, "end"]


def test_a_stream_is_read_no_faster_than_people_speak(service: RunningService) -> None:
    """Ten seconds may come at once; what is more waits for the clock."""
    begin = time.monotonic()
    messages = spoken(service, bytes(2 * int(12.5 * RATE_HZ)), size=32_000)
    assert messages[-1]["duration_s"] == 12.5
    assert time.monotonic() - begin > 1.0


def test_keys_come_in_a_header_or_a_subprotocol(tmp_path: Path, started: list[RunningService]) -> None:
    keys = [
        {"name": "app", "sha256": hash_key("secret")},
        {"name": "clerk", "sha256": hash_key("other"), "scopes": ["enrol"]},
    ]
    service = start_service(tmp_path, api_keys=json.dumps(keys))
    started.append(service)
    for options, status in (
        ({}, 401),
        ({"additional_headers": {"X-API-Key": "wrong"}}, 401),
        ({"subprotocols": ["bearer", "wrong"]}, 401),
        ({"subprotocols": ["bearer", "other"]}, 403),
    ):
        with pytest.raises(InvalidStatus) as refused, connect(url(service), **options):
            pass
        assert refused.value.response.status_code == status
    with connect(url(service), additional_headers={"Authorization": "Bearer secret"}) as connection:
        assert json.loads(connection.recv(timeout=PATIENCE_S))["type"] == "ready"
    with connect(url(service), subprotocols=["bearer", "secret"]) as connection:
        assert connection.subprotocol == "bearer"
    assert "secret" not in service.log.read_text()


def test_a_dropped_connection_frees_everything(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path)
    started.append(service)

    def streams() -> str:
        return next(line for line in service.get("/metrics").text.splitlines() if line.startswith("sotto_streams "))

    with ExitStack() as stack:
        connections = [stack.enter_context(connect(url(service))) for _ in range(5)]
        for connection in connections:
            connection.send(pcm(voice(1.0)))
        assert streams() == "sotto_streams 5.0"
        for connection in connections:
            # As if the machine at the other end had lost its power.
            connection.socket.shutdown(socket.SHUT_RDWR)
    end = time.monotonic() + PATIENCE_S
    while streams() != "sotto_streams 0.0":
        assert time.monotonic() < end, streams()


# What follows needs no service.

HOP = 800
WORDS = 3


@pytest.fixture(scope="module")
def info(builtin_store: LocalStore) -> KeywordInfo:
    manifest = builtin_store.resolve("sotto-edge").manifest
    return manifest.keywords.model_copy(update={"labels": manifest.keywords.labels[:WORDS], "window_s": 1.0})


def stream_of(info: KeywordInfo) -> WindowStream:
    return WindowStream(info, Pace(), Spotter(info, Pace(), allowed_labels(info, []), 0.5), shortest_s=0.1)


def logits(window: Window, said: list[tuple[float, float, int]]) -> Array:
    """As if the network heard, from second to second, the keyword with that number."""
    found = np.full((-(-len(window.samples) // HOP), 1 + WORDS), -6.0, np.float32)
    found[:, 0] = 6.0
    for start_s, end_s, number in said:
        times = window.span.start_s + np.arange(len(found)) * HOP / RATE_HZ
        found[(start_s <= times) & (times < end_s), 1 + number] = 9.0
    return found


def told(
    info: KeywordInfo, said: list[tuple[float, float, int]], *, seconds: float, size: int
) -> list[tuple[str, float]]:
    stream, events = stream_of(info), []
    samples = np.zeros(int(seconds * RATE_HZ), np.float32)
    for start in range(0, len(samples), size):
        for window in stream.push(samples[start : start + size]):
            events += stream.settle(window, logits(window, said))
    for window in stream.flush():
        events += stream.settle(window, logits(window, said))
    return [(event.keyword, round(event.start_s, 1)) for event in events]


@pytest.mark.parametrize("size", [1, 160, 4_000, 4_001, 48_000])
def test_each_word_is_told_once_however_the_audio_comes(info: KeywordInfo, size: int) -> None:
    first, second = info.labels[0].label, info.labels[1].label
    said = [(0.3, 0.8, 0), (2.0, 2.5, 1), (3.6, 4.1, 0), (5.2, 5.7, 0)]
    wanted = [(first, 0.3), (second, 2.0), (first, 3.6), (first, 5.2)]
    assert told(info, said, seconds=6.0, size=size) == wanted


def test_the_rest_of_a_word_is_not_another_one(info: KeywordInfo) -> None:
    """The first of two words is heard in the beginning of the second until that one is complete."""
    stream, events = stream_of(info), []
    prefix, whole = info.labels[0].label, info.labels[1].label
    for number in range(12):
        for window in stream.push(np.zeros(4_000, np.float32)):
            heard_s = (number + 1) * 0.25
            said = [(1.0, 1.9, 1)] if heard_s >= 1.5 else [(1.0, 1.3, 0)]
            events += stream.settle(window, logits(window, said))
    found = [(event.keyword, round(event.start_s, 1)) for event in events]
    assert found[-1:] == [(whole, 1.0)] or found == [(prefix, 1.0)]
    assert len(found) == 1


def test_silence_in_no_samples_is_nothing(info: KeywordInfo) -> None:
    stream = stream_of(info)
    for _ in range(1000):
        assert list(stream.push(np.zeros(0, np.float32))) == []
    assert stream._waiting._parts == []


def test_a_long_word_is_one_word(info: KeywordInfo) -> None:
    assert told(info, [(1.0, 4.5, 0)], seconds=6.0, size=4_000) == [(info.labels[0].label, 1.0)]


def test_a_word_at_the_very_end_is_told_when_the_stream_ends(info: KeywordInfo) -> None:
    assert told(info, [(1.8, 2.0, 2)], seconds=2.0, size=4_000) == [(info.labels[2].label, 1.8)]


def test_memory_is_that_of_one_window(info: KeywordInfo) -> None:
    stream = stream_of(info)
    for _ in range(200):
        for window in stream.push(np.zeros(RATE_HZ, np.float32)):
            assert len(window.samples) <= info.window_s * RATE_HZ
            stream.settle(window, logits(window, [(0.0, 1e9, 0)]))
    held = sum(len(part) for part in (stream._kept, *stream._waiting._parts))
    assert held <= (info.window_s + Pace().hop_s) * RATE_HZ
    assert len(stream._spotter._told) == 1


def test_a_service_that_stops_tells_what_was_said_and_ends_its_streams(
    tmp_path: Path, started: list[RunningService]
) -> None:
    service = start_service(tmp_path)
    started.append(service)
    audio = pcm(samples_of("computer.wav"))
    with connect(url(service)) as talking, connect(url(service)) as silent, connect(url(service)) as brief:
        talking.send(audio)
        assert json.loads(talking.recv(timeout=PATIENCE_S))["type"] == "ready"
        # Too little to wake anybody for, and there once what follows it is answered.
        brief.send(bytes(640))
        assert brief.ping().wait(PATIENCE_S)
        service.process.send_signal(signal.SIGTERM)
        *events, end = listen(talking)
        assert [event["keyword"] for event in events] == ["en:computer"]
        assert end == {"type": "end", "duration_s": pytest.approx(len(audio) / 32_000, abs=0.001)}
        assert [event["type"] for event in listen(silent)] == ["ready", "end"]
        assert listen(brief)[-1] == {"type": "end", "duration_s": 0.02}
    assert (talking.close_code, silent.close_code) == (1012, 1012)
    assert service.process.wait(PATIENCE_S) == 0
