"""The service that a bundle is measured through."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_store import LocalStore, Manifest, builtin_store_path
from tests.conftest import REPOSITORY
from training.errors import MeasurementError
from training.evaluation.client import Upload, served


def spoken(name: str) -> Upload:
    return Upload((REPOSITORY / "examples" / name).read_bytes(), "audio/wav")


def test_versions_are_served_under_their_numbers_and_know_whom_another_of_their_space_enrolled() -> None:
    store = LocalStore(builtin_store_path())
    fast, whole = store.resolve("sotto-edge@6"), store.resolve("sotto-edge@4")
    assert fast.manifest.speaker_space == whole.manifest.speaker_space
    with served(fast.path, whole) as client:
        assert client.model() == {"name": "sotto-edge", "version": 6}
        client.enrol("ada", [spoken("five-words.wav")] * 3)
        found = client.compare(spoken("five-words.wav"), ["ada"])
        assert found is not None
        assert found["ada"]["score"] > 0


def test_a_draft_is_the_first_version(made_draft: tuple[Path, Manifest]) -> None:
    with served(made_draft[0]) as client:
        assert client.model() == {"name": "tiny", "version": 1}


def test_nobody_is_enrolled_for_a_draft(made_draft: tuple[Path, Manifest]) -> None:
    other = LocalStore(builtin_store_path()).resolve("sotto-edge@4")
    with pytest.raises(MeasurementError, match="not been published"), served(made_draft[0], other):
        pass
