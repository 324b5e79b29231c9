"""A name and a number mean one network, whatever store it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from model_store import LocalStore
from service.app import create_app
from service.engine import Engine
from service.settings import Settings
from service.speakers.spaces import mark_of, probe
from service.speakers.store import ProfileStore
from tests.conftest import LOCAL, encoded, voice

WAV = {"Content-Type": "audio/wav"}
VOICE = encoded(voice(4.0))
PICKED = {1_000: -0.140122, 5_000: 0.147426, 12_345: -1.8e-05, 20_000: 0.0, 31_000: 0.00094}


@contextmanager
def serving(folder: Path, data: Path, builtin: LocalStore, version: int) -> Iterator[TestClient]:
    """A store of its own, whose `mine@1` is one of the built-in models."""
    made, bundle = LocalStore(folder), builtin.resolve(f"sotto-edge@{version}")
    speaker = bundle.manifest.speaker
    assert speaker is not None
    manifest = bundle.manifest.model_copy(
        update={"name": "mine", "version": 1, "speaker": speaker.model_copy(update={"space": None})}
    )
    made.publish(manifest, {name: bundle.read(name) for name in manifest.files})
    given = {"data_dir": data, "models_dir": folder, "model": "mine@1", "inference_threads": 1}
    with TestClient(create_app(Settings.model_validate(given)), LOCAL) as client:
        yield client


def asked(client: TestClient, what: str, **query: str) -> tuple[int, str]:
    response = client.post(what, params=query, content=VOICE, headers=WAV)
    return response.status_code, response.json().get("code", "")


def test_another_network_of_that_name_is_refused_and_the_same_one_is_not(
    tmp_path: Path, builtin_store: LocalStore
) -> None:
    data = tmp_path / "data"
    with ExitStack() as stack:
        first, again, other = (
            stack.enter_context(serving(tmp_path / name, data, builtin_store, version))
            # 6 is 4 in other arithmetic.
            for name, version in (("first", 4), ("again", 6), ("other", 3))
        )
        assert asked(first, "/v1/speakers/ada/enrollments") == (200, "")
        assert asked(again, "/v1/speakers/ada/verify") == (200, "")
        for route in ("ada/enrollments", "ada/verify", "identify"):
            assert asked(other, f"/v1/speakers/{route}") == (409, "model_mismatch")
        assert asked(other, "/v1/analyze", tasks="keywords", speaker_id="ada") == (409, "model_mismatch")
        # What needs no profiles is served.
        assert asked(other, "/v1/embeddings", type="speaker") == (200, "")
        assert asked(other, "/v1/keywords/detect") == (200, "")


def test_the_first_mark_stays(database_url: str) -> None:
    first, second = np.eye(2, dtype=np.float32)
    store = ProfileStore(database_url)
    try:
        np.testing.assert_array_equal(store.claim(("mine", 1), first), first)
        np.testing.assert_array_equal(store.claim(("mine", 1), second), first)
        np.testing.assert_array_equal(store.claim(("mine", 2), second), second)
    finally:
        store.close()
    reopened = ProfileStore(database_url)
    try:
        np.testing.assert_array_equal(reopened.claim(("mine", 1), second), first)
    finally:
        reopened.close()


def test_marks_tell_networks_apart_by_far(builtin_store: LocalStore) -> None:
    marks = {
        version: mark_of(Engine(builtin_store.resolve(f"sotto-edge@{version}"), intra_op_threads=1))
        for version in (3, 4, 6)
    }
    assert float(marks[4] @ marks[6]) > 0.99
    assert float(marks[3] @ marks[4]) < 0.7


def test_the_probe_is_what_databases_hold_marks_of() -> None:
    """Changing it would refuse every speaker that is enrolled anywhere."""
    samples = probe()
    assert (len(samples), samples.dtype) == (32_000, np.float32)
    assert samples[list(PICKED)] == pytest.approx(list(PICKED.values()), abs=1e-5)
