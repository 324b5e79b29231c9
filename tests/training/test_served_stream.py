"""A bundle with a streaming graph behind the service: streams hear what clips hear, each its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from model_store import LocalStore, Manifest
from service.app import create_app
from service.audio import Waveform
from service.engine import Engine
from service.settings import Settings
from tests.conftest import LOCAL, voice

Events = list[tuple[str, float, float, float]]


@pytest.fixture(scope="module")
def store(made_draft: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    folder, manifest = made_draft
    assert manifest.stream is not None
    store = LocalStore(tmp_path_factory.mktemp("streamed"))
    store.publish(manifest, {name: (folder / name).read_bytes() for name in manifest.files})
    return store


@pytest.fixture(scope="module")
def client(store: LocalStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings.model_validate(
        {"data_dir": tmp_path_factory.mktemp("data"), "models_dir": store.root, "model": "tiny", "inference_threads": 2}
    )
    with TestClient(create_app(settings), LOCAL) as made:
        yield made


def streamed(client: TestClient, pcm: bytes, size: int) -> Events:
    """What is told of the audio, sent in messages of so many bytes."""
    events = []
    with client.websocket_connect(f"{LOCAL}/v1/keywords/stream?threshold=0.2".replace("http", "ws")) as connection:
        assert connection.receive_json()["type"] == "ready"
        for start in range(0, len(pcm), size):
            connection.send_bytes(pcm[start : start + size])
        connection.send_text(json.dumps({"type": "end"}))
        while (message := connection.receive_json())["type"] == "detection":
            events.append((message["keyword"], message["start_s"], message["end_s"], message["score"]))
        assert message["type"] == "end", message
        assert message["duration_s"] == round(len(pcm) / 32_000, 3)
    return events


def spoken(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    parts = [voice(float(rng.uniform(0.3, 0.9))) * float(rng.uniform(0.3, 1.0)) for _ in range(4)]
    gaps = [np.zeros(int(rng.uniform(0.5, 1.0) * 16_000)) for _ in range(4)]
    samples = np.concatenate([one for pair in zip(parts, gaps, strict=True) for one in pair])
    return (samples.clip(-1, 1) * 32767).astype("<i2").tobytes()


def test_the_logits_of_a_stream_are_those_of_the_clip(store: LocalStore) -> None:
    engine = Engine(store.resolve("tiny"), intra_op_threads=1)
    assert engine.streaming is not None
    samples = np.frombuffer(spoken(1), "<i2").astype(np.float32) / 32768
    whole = engine.run([Waveform(samples)], "keywords")[0].keyword_logits
    np.testing.assert_allclose(engine.streaming.whole(samples, frames=5), whole, atol=1e-4)


@pytest.mark.parametrize("size", [640, 9_999, 10**9])
def test_what_is_told_does_not_depend_on_the_messages(client: TestClient, size: int) -> None:
    pcm = spoken(2)
    wanted = streamed(client, pcm, 8_000)
    assert wanted
    found = streamed(client, pcm, size)
    assert [one[0] for one in found] == [one[0] for one in wanted]


def test_many_streams_at_once_are_each_as_if_alone(client: TestClient) -> None:
    audio = [spoken(seed) for seed in range(12)]
    alone = [streamed(client, pcm, 8_000) for pcm in audio]
    # Thirty steps may teach one word for all that is heard, so each tells at least one; most scores are their own.
    assert all(alone)
    assert len({told[0][3] for told in alone}) > len(audio) / 2
    with ThreadPoolExecutor(len(audio)) as pool:
        together = list(pool.map(lambda pcm: streamed(client, pcm, 8_000), audio))
    for told, own in zip(together, alone, strict=True):
        assert [one[:3] for one in told] == [one[:3] for one in own]
        np.testing.assert_allclose([one[3] for one in told], [one[3] for one in own], atol=2e-4)
