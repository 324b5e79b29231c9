"""The card of a bundle, from the draft of a tiny run on made-up voices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from model_store import GraphInfo, Manifest
from model_store.files import describe
from model_store.store import open_bundle
from training.card import CARD, UNSAID, card, rebuild, record_figures
from training.errors import ExportError
from training.evaluation.report import Figure, Report
from training.manifest import Data, read_data

REPORT = Report(
    "tiny@0",
    "dev",
    "sotto evaluate x",
    [Figure("asc top-1", 91.256, "%", "n = 3"), Figure("none", float("nan"), "")],
)


@pytest.fixture
def draft(made_draft: tuple[Path, Manifest], tmp_path: Path) -> Path:
    shutil.copytree(made_draft[0], tmp_path / "draft")
    return tmp_path / "draft"


@pytest.fixture
def data(made_data: Path) -> Data:
    return read_data(made_data, calibration_fraction=0.1, seed=7)


def test_figures_go_into_card_and_manifest_with_their_hash(draft: Path, data: Data) -> None:
    manifest = record_figures(draft, REPORT, data, data_name="dev split of made", about="## Limits\n\nMade up.")
    text = (draft / CARD).read_text()
    assert "| asc top-1 | 91.26 % | n = 3 |" in text
    assert "## Limits\n\nMade up." in text
    assert UNSAID not in text
    stored = json.loads((draft / "manifest.json").read_text())
    assert stored["files"][CARD]["sha256"] == describe(text.encode()).sha256
    assert [metric.name for metric in manifest.metrics] == ["asc top-1"]


def test_the_data_is_counted_from_the_tables_without_the_fold(made_draft: tuple[Path, Manifest], data: Data) -> None:
    lines = card(made_draft[1], REPORT, data).splitlines()
    row = next(line for line in lines if line.startswith("| asc |"))
    kept = [clip for clip in data.split("train") if clip.corpus == "asc"]
    people = len({clip.speaker for clip in kept})
    assert people == 7
    assert row.endswith(f"| {people} | ar | CC0 |")


def test_a_published_version_is_never_written_again(draft: Path, data: Data) -> None:
    published = open_bundle(draft).manifest.model_copy(update={"version": 3})
    (draft / "manifest.json").write_text(published.to_json())
    with pytest.raises(ExportError, match="tiny@3, which is published"):
        record_figures(draft, REPORT, data, data_name="dev split of made", about="Another.")
    assert open_bundle(draft).manifest == published
    assert not (draft / CARD).exists() or "Another." not in (draft / CARD).read_text()


def test_a_card_without_a_word_from_its_maker_says_so(made_draft: tuple[Path, Manifest], data: Data) -> None:
    assert UNSAID in card(made_draft[1], REPORT, data)


def test_a_card_says_in_what_clips_are_computed(made_draft: tuple[Path, Manifest], data: Data) -> None:
    manifest = made_draft[1]
    rounded = manifest.graph.model_copy(update={"weights": "int8", "arithmetic": "int8"})
    assert "eight bits" not in card(manifest, REPORT, data)
    assert "eight bits, streams in float" in card(manifest.model_copy(update={"graph": rounded}), REPORT, data)


PLAIN = GraphInfo(file="model.onnx", opset=17, parameters=1)


def test_a_tuned_model_is_rebuilt_by_fine_tuning() -> None:
    assert rebuild("mine", {"name": "mine", "data": "recordings", "init": "runs/d/model"}, PLAIN)[0] == (
        ".venv-dev/bin/sotto finetune training/recipes/mine.yaml --init runs/d/model --run runs/mine"
    )
    assert rebuild("sotto-edge", {"name": "edge", "data": {"root": "x"}}, PLAIN)[0].startswith("make train")
    taught = {"name": "edge-again", "data": {"root": "x"}, "hints": {"weight": 1.0}, "voices": {"weight": 3.0}}
    assert rebuild("sotto-edge", taught, PLAIN)[:2] == [
        "make teachers peers",
        "make train RECIPE=training/recipes/edge-again.yaml",
    ]
    later = {"name": "edge-apart", "data": {"root": "x"}, "voices": {"weight": 3.0}, "after": taught}
    assert rebuild("sotto-edge", later, PLAIN)[0] == "make teachers peers"
    from_here = {**taught, "hints": {"network": "sotto-edge@7"}, "voices": None}
    assert rebuild("sotto-micro", from_here, PLAIN)[0].startswith("make train")
    assert rebuild("x", {**from_here, "hints": {"network": "whisper-base"}}, PLAIN)[0] == "make teachers"
    assert rebuild("x", {**from_here, "shape": {"trunk": {"layers": 6}}}, PLAIN)[0] == "make teachers"
    assert not any("compact" in line for line in rebuild("sotto-edge", taught, PLAIN))
    small = rebuild("sotto-edge", taught, PLAIN.model_copy(update={"weights": "int8"}))
    assert small[3] == ".venv-dev/bin/sotto compact runs/edge-again/bundle"
    fast = rebuild("sotto-edge", taught, PLAIN.model_copy(update={"weights": "int8", "arithmetic": "int8"}))
    assert fast[3] == ".venv-dev/bin/sotto quantise runs/edge-again/bundle"
