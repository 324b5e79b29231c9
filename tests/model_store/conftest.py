"""A tiny model that keeps the contract, as a draft, as a bundle on disk and in a store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_store import Bundle, LocalStore
from tests.model_store.bundles import Draft, draft_of, manifest_for
from tests.model_store.graphs import graph


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut would show what fsync does, and on a busy disk each call may take a second."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def draft() -> Draft:
    """Sound: verifies as it is."""
    return draft_of(graph().SerializeToString())


@pytest.fixture(scope="session")
def hollow() -> Draft:
    """A draft whose files hold a few bytes each: enough for a store, which does not look inside."""
    files = {name: name.encode() for name in ("MODEL_CARD.md", "cohort.f32", "golden.npz", "model.onnx")}
    return Draft(manifest_for(files), files)


@pytest.fixture
def bundle(draft: Draft, tmp_path: Path) -> Bundle:
    return draft.write(tmp_path / "bundle")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails where a graph reaches ONNX Runtime."""

    def reached(*_: object, **__: object) -> None:
        pytest.fail("a graph reached ONNX Runtime")

    monkeypatch.setattr("onnxruntime.InferenceSession", reached)
