"""A bundle without a task for speakers: the contract without `speaker_embedding`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model_store import BundleError, verify_bundle
from model_store.golden import pack, unpack
from tests.model_store.bundles import Draft, draft_of
from tests.model_store.graphs import contract_outputs, graph

SPOKEN = [output for output in contract_outputs() if output.name != "speaker_embedding"]


@pytest.fixture(scope="module")
def whole() -> Draft:
    return draft_of(graph().SerializeToString())


@pytest.fixture(scope="module")
def keywords_only(whole: Draft) -> Draft:
    clip, outputs = unpack(whole.files["golden.npz"])
    golden = pack(clip, {name: values for name, values in outputs.items() if name != "speaker_embedding"})
    draft = whole.with_file("golden.npz", golden)
    draft = draft.with_file("model.onnx", graph(outputs=SPOKEN).SerializeToString())
    return replace(draft, manifest=draft.manifest.model_copy(update={"speaker": None}))


def test_it_is_verified(keywords_only: Draft, tmp_path: Path) -> None:
    bundle = keywords_only.write(tmp_path / "bundle")
    verify_bundle(bundle)
    assert bundle.manifest.speaker is None


def test_its_graph_must_not_tell_speakers_apart(whole: Draft, tmp_path: Path) -> None:
    draft = replace(whole, manifest=whole.manifest.model_copy(update={"speaker": None}))
    with pytest.raises(BundleError, match="outputs"):
        verify_bundle(draft.write(tmp_path / "bundle"))


def test_a_graph_that_does_not_is_refused_where_the_manifest_says_so(
    whole: Draft, keywords_only: Draft, tmp_path: Path
) -> None:
    draft = replace(
        keywords_only, manifest=keywords_only.manifest.model_copy(update={"speaker": whole.manifest.speaker})
    )
    with pytest.raises(BundleError, match="outputs"):
        verify_bundle(draft.write(tmp_path / "bundle"))
