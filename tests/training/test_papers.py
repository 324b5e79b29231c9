"""The five papers' own recipe files from end to end, as small as they go: what they make must be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import REPOSITORY, encoded, voice
from tests.training.chain import pretrain_recipe
from training.evaluation.client import Upload, served
from training.outcome import Outcome
from training.plan import Budget, StudyRecipe, join_studies, load_study, only_rows
from training.study import Setting, run_study

PAPERS = sorted((REPOSITORY / "training/recipes/papers").glob("*.yaml"))
# As deep as the teacher that the recipes name, of bands and with norms first like it, a thousandth of its size.
SHAPE = {
    "hidden_size": 16, "layers": 12, "heads": 2, "feed_forward": 24, "conv_channels": 8, "pre_norm": True, "mel": True,
    "dropout": 0.0,
}  # fmt: skip
# Rows of each paper that no other has, but for the plain student, and for S3-Router each thing that masks end in.
PAPER_ROWS = {
    "multi-task": ("student",),
    "star": ("star",),
    "robust": ("robust-unmasked",),
    "os-kdft": ("os-kdft-a", "os-kdft-b"),
    "s3-router": ("masks-8", "pruned-50", "slim-50"),
}
ROWS = [row for rows in PAPER_ROWS.values() for row in rows]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("papers")


@pytest.fixture(scope="module")
def study(work: Path, made_data: Path) -> StudyRecipe:
    """The recipes as they stand, but for the teacher, with fewer rooms to simulate, and nothing calibrated."""
    teacher = work / "teacher.yaml"
    teacher.write_text(yaml.safe_dump(pretrain_recipe(made_data, shape=SHAPE).model_dump(mode="json")))
    joined, sections = join_studies([load_study(path) for path in PAPERS])
    cut = only_rows(joined.model_copy(update={"teacher": teacher}), sections, ROWS)[0]
    rows = {name: row.model_copy(update={"timed_only": True}) for name, row in cut.rows.items()}
    distil = {name: one.model_copy(update={"changes": _few_rooms(one.changes)}) for name, one in cut.distil.items()}
    return cut.model_copy(update={"rows": rows, "distil": distil})


def _few_rooms(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: 2 if name == "simulated_rooms" else value for name, value in changes.items()}


@pytest.fixture(scope="module")
def outcome(study: StudyRecipe, work: Path, made_data: Path) -> Outcome:
    setting = Setting(work / "run", work / "cache", "dev", "c", lambda _: None, made_data, Budget(2, 2))
    return run_study(study, setting)


def test_each_paper_has_a_row_here(study: StudyRecipe) -> None:
    assert {path.stem for path in PAPERS} == PAPER_ROWS.keys()
    for path in PAPERS:
        own = load_study(path).rows
        assert {row: study.rows[row].init for row in PAPER_ROWS[path.stem]} == {
            row: own[row].init for row in PAPER_ROWS[path.stem]
        }


@pytest.mark.parametrize("row", ["reference", *ROWS])
def test_it_ends_in_a_bundle_that_is_served(outcome: Outcome, work: Path, row: str) -> None:
    assert outcome.rows[row].error == ""
    with served(work / "run" / f"row-{row}" / "run/bundle") as client:
        clip = Upload(encoded(voice(2.0)), "audio/wav")
        assert client.detect(clip)["top"][0]["keyword"] in client.keywords()
        assert np.linalg.norm(client.speaker_embedding(clip)) == pytest.approx(1, abs=1e-4)
        assert client.enrol("ada", [clip, clip])["status"] == "enrolled"
        assert client.compare(clip, ["ada"])["ada"]["cosine"] > 0.9
