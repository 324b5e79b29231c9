"""What `import model_store` offers; a change here is a change for everybody who imports it."""

from __future__ import annotations

import pytest

import model_store

EXPECTED = [
    "AliasError",
    "AudioLimits",
    "Bundle",
    "BundleError",
    "Calibration",
    "EmbeddingInfo",
    "FileEntry",
    "GraphInfo",
    "Keyword",
    "KeywordInfo",
    "Lineage",
    "LocalStore",
    "Manifest",
    "Metric",
    "ModelNotFoundError",
    "ModelReference",
    "OperatingPoint",
    "SpeakerInfo",
    "StoreError",
    "StreamInfo",
    "builtin_store_path",
    "verify_bundle",
]


def test_all_is_the_expected_list() -> None:
    assert sorted(model_store.__all__) == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_every_name_can_be_imported(name: str) -> None:
    assert callable(getattr(model_store, name))


@pytest.mark.parametrize("name", ["BundleError", "ModelNotFoundError", "AliasError"])
def test_one_except_clause_catches_every_error(name: str) -> None:
    assert issubclass(getattr(model_store, name), model_store.StoreError)
