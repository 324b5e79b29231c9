"""`speaker_dim: 0`: a student that hears keywords only, from its recipe to a bundle that the store verifies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_store import LocalStore, Manifest, verify_bundle
from model_store.store import open_bundle
from tests.training.conftest import TinyRun, train_tiny
from tests.training.made_data import tiny_recipe
from training.calibrate import calibrate
from training.card import card
from training.compact import compact
from training.evaluation.report import Report
from training.export import export
from training.manifest import read_data
from training.recipe import Recipe
from training.students.edge import Edge, EdgeShape


@pytest.fixture(scope="module")
def keyword_run(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    work = tmp_path_factory.mktemp("keyword-run")
    recipe = tiny_recipe(made_data)
    shape = replace(recipe.shape, speaker_dim=0)
    return train_tiny(recipe.model_copy(update={"shape": shape}), work / "run", work / "cache")


@pytest.fixture(scope="module")
def draft(keyword_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("keyword-draft")
    return folder, export(keyword_run.folder, folder, name="words")


def test_it_has_no_speaker_branch_and_still_embeds() -> None:
    whole, words = Edge(6).eval(), Edge(6, EdgeShape(speaker_dim=0)).eval()
    assert not any("speaker" in name or "pool" in name for name in words.state_dict())
    assert sum(one.numel() for one in words.parameters()) < 0.7 * sum(one.numel() for one in whole.parameters())
    out = words(torch.randn(2, 16_000), torch.tensor([16_000, 9_000]))
    assert out.speaker_embedding.shape == (2, 0)
    assert out.frames.shape[2] == out.embedding.shape[1] == words.shape.embedding_dim == 256


def test_it_learns(keyword_run: TinyRun) -> None:
    losses = keyword_run.losses
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_it_becomes_a_bundle_without_speakers(draft: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = draft
    assert manifest.speaker is None
    assert "cohort.f32" not in manifest.files
    small = compact(folder)
    bundle = LocalStore(tmp_path / "store").publish(small, {name: (folder / name).read_bytes() for name in small.files})
    verify_bundle(bundle)


def test_its_thresholds_are_fitted_and_its_card_names_no_speakers(
    draft: tuple[Path, Manifest], made_data: Path
) -> None:
    folder, _ = draft
    fitted = calibrate(folder, data_root=None, say=lambda _line: None)
    assert "set aside" in fitted.keywords.thresholds_from
    assert open_bundle(folder).manifest == fitted
    text = card(fitted, Report("words@1", "dev", "sotto evaluate"), read_data(made_data))
    assert "It does not tell speakers apart." in text
    assert "speaker embedding" not in text


def test_a_teacher_of_voices_needs_a_branch_to_teach(made_data: Path) -> None:
    given = tiny_recipe(made_data).model_dump()
    with pytest.raises(ValueError, match="speaker_dim is 0"):
        Recipe.model_validate({**given, "shape": {**given["shape"], "speaker_dim": 0}, "voices": {}})
