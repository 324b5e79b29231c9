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
from training.plan import Budget, StudyRecipe, distillation, join_studies, load_study, only_rows, tuning
from training.rows import Setting
from training.study import run_study

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
    "robust": ("robust", "robust-unmasked"),
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
    rows = {
        name: row.model_copy(update={"timed_only": True, "changes": _made_corpora(row.changes)})
        for name, row in cut.rows.items()
    }
    distil = {name: one.model_copy(update={"changes": _few_rooms(one.changes)}) for name, one in cut.distil.items()}
    return cut.model_copy(update={"rows": rows, "distil": distil})


def _made_corpora(changes: dict[str, Any]) -> dict[str, Any]:
    """Where OS-KDFT's distillation begins, of the corpora that are made up here."""
    if "corpora" not in changes.get("one_step", {}):
        return changes
    return {**changes, "one_step": {**changes["one_step"], "corpora": ["gsc"]}}


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


def test_each_paper_is_held_against_what_it_is_to_be_better_than() -> None:
    """Checklists 2(e)(7), 3(e)(6), 4(e)(5 and 7), 5(e)(4, 5 and 7): what has to be compared has its row."""
    joined, _ = join_studies([load_study(path) for path in PAPERS])
    tuned = {name: tuning(joined, name) for name in joined.rows}
    # No row stops or is chosen by what is watched.
    assert {recipe.schedule.patience for recipe in tuned.values()} == {0}
    related = {name: distillation(joined, row.init).relations for name, row in joined.rows.items() if "star" in name}
    assert {name: (one.attention, one.layerwise, one.intra, one.scaling) for name, one in related.items()} == {
        "star": (False, True, True, "cosine"),
        "star-layerwise": (False, True, False, "cosine"),
        "star-intra": (False, False, True, "cosine"),
        "star-attention": (True, False, False, "cosine"),
        "star-all": (True, True, True, "cosine"),
        "star-raw": (False, True, True, "none"),
    }
    # The clean student hears neither noise nor rooms, in neither part; both are measured in all of them.
    clean, robust = joined.rows["clean"], joined.rows["robust"]
    assert (clean.grid, robust.grid, robust.against, clean.changes) == (True, True, "clean", robust.changes)
    assert (tuned["clean"].augment.p_noise, tuned["clean"].augment.p_room) == (0.0, 0.0)
    assert distillation(joined, clean.init).corruption is None
    assert distillation(joined, robust.init).corruption is not None
    # One step beside two, with the same parts.
    for name in ("os-kdft-a", "os-kdft-b"):
        two = tuned[joined.rows[name].against]
        assert two.one_step is None
        assert tuned[name].layers == distillation(joined, joined.rows[joined.rows[name].against].init).layers
        same = {"one_step": None, "layers": 0, "name": two.name}
        assert tuned[name].model_copy(update=same) == two
    # Masks beside weights, from one beginning; scores by rank beside random ones; three tasks on one backbone.
    masks = {name: recipe.masks for name, recipe in tuned.items() if name.startswith("masks")}
    assert {(one.sparsity, one.init) for one in masks.values()} == {
        (0.0, "rank"), (0.04, "rank"), (0.08, "rank"), (0.08, "random"), (0.12, "rank"),
    }  # fmt: skip
    assert {joined.rows[name].init for name in masks} == {joined.rows["student"].init}
    routes = [name for name, row in joined.rows.items() if row.together == "router"]
    assert len(routes) == 3
    for name in routes:
        own = tuned[joined.rows[name].against]
        assert (own.mode, own.tasks, own.corpora) == ("full", tuned[name].tasks, tuned[name].corpora)


@pytest.mark.parametrize("row", ["reference", *ROWS])
def test_it_ends_in_a_bundle_that_is_served(outcome: Outcome, work: Path, row: str) -> None:
    assert outcome.rows[row].error == ""
    with served(work / "run" / f"row-{row}" / "run/timed") as client:
        clip = Upload(encoded(voice(2.0)), "audio/wav")
        assert client.detect(clip)["top"][0]["keyword"] in client.keywords()
        assert np.linalg.norm(client.speaker_embedding(clip)) == pytest.approx(1, abs=1e-4)
        assert client.enrol("ada", [clip, clip])["status"] == "enrolled"
        assert client.compare(clip, ["ada"])["ada"]["cosine"] > 0.9
