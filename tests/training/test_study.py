"""A study from recipe to figures, on made voices; the page is in test_page.py."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.training.chain import distil_recipe, pretrain_recipe, tune_recipe
from training import rows as rows_module
from training.distil import DistilRecipe
from training.errors import RecipeError, RunError, TrainingError
from training.files import locked
from training.outcome import Outcome
from training.plan import (
    Budget,
    StudyRecipe,
    distillation,
    join_studies,
    load_study,
    only_rows,
    tuning,
)
from training.pretrain import PretrainRecipe, pretrain, publish_teacher
from training.recipe import read_recipe
from training.rows import Setting
from training.study import run_study
from training.trainer import losses_of


@pytest.fixture(scope="module")
def study_file(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    parts = {
        "teacher": pretrain_recipe(made_data),
        "distil": distil_recipe(made_data),
        "finetune": tune_recipe(made_data),
    }
    for name, part in parts.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(part.model_dump(mode="json")))
    study = {
        "name": "made",
        "title": "Made voices",
        "teacher": str(folder / "teacher.yaml"),
        "distil": {
            "distilled": str(folder / "distil.yaml"),
            "taught": {"recipe": str(folder / "distil.yaml"), "teacher": "reference"},
        },
        "finetune": str(folder / "finetune.yaml"),
        "student": "keywords",
        "rows": {
            "reference": {"title": "reference"},
            "keywords": {"title": "keywords only", "init": "distilled", "changes": {"tasks": ["keywords"]}},
            "timed": {"title": "timed", "init": "taught", "timed_only": True},
            "impossible": {"title": "too many layers", "changes": {"layers": 99}},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def changed(study_file: Path, folder: Path, **changes: object) -> Path:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(study_file.read_text()), **changes}, sort_keys=False))
    return path


def test_a_study_is_trained_measured_and_not_done_twice(study_file: Path, tmp_path: Path) -> None:
    """On `train`, since the made data has too few speakers in dev for trials."""
    study = load_study(study_file)
    said: list[str] = []

    def run() -> Outcome:
        said.clear()
        return run_study(study, Setting(tmp_path / "run", tmp_path / "cache", "train", "c", said.append))

    outcome = run()
    assert list(outcome.rows) == ["reference", "keywords", "timed", "impossible"]
    reference, keywords = outcome.rows["reference"], outcome.rows["keywords"]
    assert 0 <= reference.value("keywords top-1") <= 100
    assert 0 <= reference.value("sv EER") <= 100
    assert keywords.value("sv EER") != keywords.value("sv EER")  # not a number: never trained, never measured
    assert 0 < keywords.value("parameters") < reference.value("parameters")
    assert reference.value("parameters") < reference.value("parameters, training heads included")
    assert 0 < keywords.value("multiply-accumulates") < reference.value("multiply-accumulates")
    assert all(row.value("trunk alone, one thread") > 0 for row in outcome.rows.values() if not row.error)
    assert "cores" in outcome.machine
    assert 0 < reference.value("training") < keywords.value("training")
    assert "99" in outcome.rows["impossible"].error
    assert "measuring sv" in said
    timed = outcome.rows["timed"]
    assert not {figure.name for figure in timed.figures} & {"keywords top-1", "sv EER"}
    assert timed.value("one second of audio, one thread") > 0
    losses = losses_of(tmp_path / "run" / "taught")
    assert losses != losses_of(tmp_path / "run" / "distilled")
    assert timed.value("distillation loss, first tenth") == losses[0]
    assert timed.value("distillation loss, last tenth") == losses[-1]
    again = run()
    assert "measuring sv" not in said
    assert again.rows["reference"].value("sv EER") == reference.value("sv EER")
    assert Outcome.read(tmp_path / "run").rows.keys() == outcome.rows.keys()


def test_changes_reach_into_sections(study_file: Path, tmp_path: Path) -> None:
    rows = {"reference": {"title": "r", "changes": {"schedule": {"steps": 3}}}}
    study = StudyRecipe.model_validate(
        yaml.safe_load(changed(study_file, tmp_path, rows=rows, student="reference").read_text())
    )
    recipe = tuning(study, "reference")
    assert recipe.schedule.steps == 3
    assert recipe.schedule.batch_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"reference": {"title": "r", "init": "nobody"}}, "student": "reference"}, "does not distil"),
        ({"rows": {"reference": {"title": "r", "changes": {"mode": "melted"}}}, "student": "reference"}, "melted"),
        ({"reference": "nobody"}, "no row 'nobody'"),
        (
            {
                "rows": {"early": {"title": "e", "init": "taught"}, "reference": {"title": "r"}},
                "student": "early",
            },
            "taught by 'reference', which is no row above early",
        ),
        ({"marks": {"smaller": 75}, "student": ""}, "marks need a row"),
        ({"rows": {"distilled": {"title": "r"}}, "reference": "distilled", "student": "distilled"}, "is both a row"),
        ({"teacher": "/nowhere.yaml"}, "nowhere"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_trained(
    study_file: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(changed(study_file, tmp_path, **changes))


PAPERS = sorted((REPOSITORY / "training/recipes/papers").glob("*.yaml"))


def test_the_five_papers_are_of_one_teacher() -> None:
    joined, sections = join_studies([load_study(path) for path in PAPERS])
    assert [path.stem for path in PAPERS] == ["multi-task", "os-kdft", "robust", "s3-router", "star"]
    assert len(sections) == 5
    assert {name for section in sections for name in section.rows} == set(joined.rows)


@pytest.mark.parametrize("name", ["kerpicci", "full-size"])
def test_the_studies_of_the_repository_are_in_order(name: str) -> None:
    study = load_study(REPOSITORY / "training/recipes" / f"{name}.yaml")
    assert study.reference in study.rows


def test_everyone_gets_the_same_budget() -> None:
    """A step that does both takes the student through two batches."""
    joined, _ = join_studies([load_study(path) for path in PAPERS])
    budget = Budget.parse("30+70")
    assert {distillation(joined, name, budget).schedule.steps for name in joined.distil} == {30}
    steps = {name: tuning(joined, name, budget).schedule.steps for name in joined.rows}
    assert {name for name, count in steps.items() if count != 70} == {"os-kdft-a", "os-kdft-b"}
    assert steps["os-kdft-a"] == 50
    # Rows may have been trained on machines of several kinds.
    assert {tuning(joined, name, budget).schedule.precision for name in joined.rows} == {"no"}


def test_a_distillation_of_a_study_is_the_recipe_s_own() -> None:
    study = load_study(REPOSITORY / "training/recipes/kerpicci.yaml")
    assert distillation(study, "distilled") == read_recipe(REPOSITORY / "training/recipes/distil.yaml", DistilRecipe)


@pytest.mark.parametrize("text", ["800", "0+5", "a+b", "1+2+3", "-1+5"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="as in 800"):
        Budget.parse(text)


def test_studies_that_do_not_go_together_are_refused(study_file: Path, tmp_path: Path) -> None:
    study = load_study(study_file)
    other = study.model_copy(update={"rows": {**study.rows, "keywords": study.rows["reference"]}})
    with pytest.raises(RecipeError, match="something else by 'keywords'"):
        join_studies([study, other])
    with pytest.raises(RecipeError, match="differ in teacher"):
        join_studies([study, study.model_copy(update={"teacher": tmp_path / "another.yaml"})])
    assert join_studies([study, study])[0].rows == study.rows


def test_rows_are_cut_down_to_those_asked_for_and_what_they_begin_with() -> None:
    joined, sections = join_studies([load_study(path) for path in PAPERS])
    cut, left = only_rows(joined, sections, ["pruned-80", "star"])
    assert list(cut.rows) == ["reference", "student", "student-on", "pruned-80", "star"]
    beside, _ = only_rows(joined, sections, ["route-sv"])
    assert list(beside.rows) == ["reference", "reference-speakers", "own-sv", "route-sv"]
    assert set(cut.distil) == {"distilled", "relations"}
    assert all(section.rows for section in left)
    with pytest.raises(RecipeError, match="there is no row 'nobody'"):
        only_rows(joined, sections, ["nobody"])


def test_a_study_without_the_row_that_is_held_against_the_marks_has_none() -> None:
    study = load_study(REPOSITORY / "training/recipes/kerpicci.yaml")
    cut, _ = only_rows(study, [], ["undistilled"])
    assert (list(cut.rows), cut.student, cut.marks) == (["reference", "undistilled"], "", {})
    whole, _ = only_rows(study, [], ["longer"])
    assert list(whole.rows) == ["reference", "taught", "longer"]
    assert (whole.student, whole.marks) == ("longer", study.marks)


MASKS = {"mode": "masks", "masks": {"sparsity": 0.2}}


@pytest.mark.parametrize(
    "second",
    [
        {"title": "b", "together": "x"},
        {"title": "b", "together": "x", "changes": {"mode": "masks", "masks": {"sparsity": 0.3}}},
        {"title": "b", "together": "x", "changes": MASKS, "init": "distilled"},
    ],
)
def test_rows_together_need_one_backbone_and_the_same_masks(
    study_file: Path, tmp_path: Path, second: dict[str, object]
) -> None:
    rows = {"reference": {"title": "r"}, "a": {"title": "a", "together": "x", "changes": MASKS}, "b": second}
    with pytest.raises(RecipeError, match="rows together"):
        load_study(changed(study_file, tmp_path, rows=rows, student="a"))


def test_a_comparison_survives_what_fails_and_measures_noise(
    study_file: Path, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distil.yaml").write_text(yaml.safe_dump(distil_recipe(made_data).model_dump(mode="json")))
    distilled = str(tmp_path / "distil.yaml")
    masked: dict[str, Any] = {"init": "tuned", "together": "x", "changes": {**MASKS, "tasks": ["keywords"]}}
    rows = {
        "reference": {"title": "reference"},
        "tuned": {"title": "tuned", "init": "distilled", "changes": {"tasks": ["keywords"]}},
        "lost": {"title": "lost", "init": "impossible"},
        "masks-a": {**masked, "title": "a"},
        "masks-b": {**masked, "title": "b", "changes": {**masked["changes"], "seed": 5}},
    }
    distil = {"distilled": distilled, "impossible": {"recipe": distilled, "changes": {"targets": [7]}}}
    study = load_study(changed(study_file, tmp_path, rows=rows, distil=distil, student="tuned"))
    setting = Setting(tmp_path / "run", tmp_path / "cache", "dev", "c", lambda _: None, budget=Budget(2, 3), noisy=True)
    joined, sections = only_rows(*join_studies([study]), ["tuned", "lost", "masks-a", "masks-b"])
    joined = joined.model_copy(update={"rows": {name: row for name, row in joined.rows.items() if name != "reference"}})
    outcome = run_study(joined, setting, sections)
    assert "impossible failed" in outcome.rows["lost"].error
    assert 0 <= outcome.rows["tuned"].value("asc top-1, dry, 10 dB") <= 100
    assert outcome.rows["tuned"].value("training") > 0
    assert outcome.rows["tuned"].value("passes") == 2 + 3
    assert outcome.rows["masks-a"].value("passes") == 2 + 3 + 3
    (one,) = outcome.shared
    assert one.rows == ["masks-a", "masks-b"]
    assert one.backbone > max(one.masks) > 0
    assert 0 < one.alike[0][2] <= 1
    assert Outcome.read(tmp_path / "run") == outcome
    with pytest.raises(RecipeError, match="another budget"):
        run_study(joined, replace(setting, budget=Budget(2, 4)), sections)
    monkeypatch.setattr(rows_module, "evaluate", None)
    assert run_study(joined, setting, sections).rows["tuned"].value("keywords top-1") >= 0


def test_rows_that_were_kept_are_not_trained_on_another_machine(
    study_file: Path, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their figures stay, and their times are of the same networks, untrained."""
    (tmp_path / "distil.yaml").write_text(yaml.safe_dump(distil_recipe(made_data).model_dump(mode="json")))
    words = {**MASKS, "tasks": ["keywords"]}
    rows = {
        "reference": {"title": "reference", "changes": {"tasks": ["keywords"]}},
        "a": {"title": "a", "init": "distilled", "together": "x", "changes": words},
        "b": {"title": "b", "init": "distilled", "together": "x", "changes": {**words, "seed": 5}},
    }
    distil = {"distilled": str(tmp_path / "distil.yaml")}
    study = load_study(changed(study_file, tmp_path, rows=rows, distil=distil, student="", marks={}))
    said: list[str] = []
    setting = Setting(tmp_path / "run", tmp_path / "cache", "dev", "c", said.append, budget=Budget(2, 3))
    teacher = pretrain(read_recipe(study.teacher, PretrainRecipe), tmp_path / "teacher", tmp_path / "cache")
    publish_teacher(teacher, tmp_path / "published")
    setting = replace(setting, teacher=tmp_path / "published", kept=tmp_path / "kept")
    first = run_study(study, setting)
    assert not [row.error for row in first.rows.values() if row.error]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"reference.json", "a.json", "b.json", "a+b.json"}
    # What is finished is not written again: another process may be reading it.
    written = [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "run").rglob("joint.json")]
    dates = [path.stat().st_mtime_ns for path in written]
    with monkeypatch.context() as patched:
        patched.setattr(rows_module.Rows, "graph", Mock(side_effect=RunError("no graph")))
        untimed = run_study(study, setting)
    assert not [row.error for row in untimed.rows.values() if row.error]
    assert untimed.rows["a"].value("keywords top-1") == first.rows["a"].value("keywords top-1")
    assert run_study(study, setting).rows["a"].value("file") == first.rows["a"].value("file")
    assert [path.stat().st_mtime_ns for path in written] == dates
    before = rows_module.Rows(study, setting)._decided("a")
    config_before = (tmp_path / "published" / "config.json").read_text()
    where = made_data / "asc" / "alignments.csv"
    assert not where.exists()
    where.write_text("path,keyword,start_s,end_s\n")
    try:
        assert rows_module.Rows(study, setting)._decided("a") != before
    finally:
        where.unlink()
    assert rows_module.Rows(study, setting)._decided("a") == before
    with (tmp_path / "published" / "config.json").open("a") as config:
        config.write("\n")
    assert rows_module.Rows(study, setting)._decided("a") != before
    (tmp_path / "published" / "config.json").write_text(config_before)
    assert rows_module.Rows(study, setting)._decided("a") == before

    said.clear()
    elsewhere = replace(setting, folder=tmp_path / "elsewhere")
    with monkeypatch.context() as patched:
        patched.setattr(rows_module, "evaluate", None)
        again = run_study(study, elsewhere)
    assert [path.name for path in (tmp_path / "elsewhere").glob("row-*") if path.is_dir()] == []
    assert again.shared == first.shared
    for name, row in again.rows.items():
        assert not row.error
        assert row.made_on == first.rows[name].made_on
        for figure in ("keywords top-1", "training", "parameters", "multiply-accumulates", "file"):
            assert row.value(figure) == pytest.approx(first.rows[name].value(figure), rel=1e-3)
        assert row.value("one second of audio, one thread") > 0

    said.clear()
    longer = {**rows, "b": {**rows["b"], "changes": {**words, "seed": 6}}}
    study = load_study(changed(study_file, tmp_path, rows=longer, distil=distil, student="", marks={}))
    run_study(study, replace(elsewhere, part=True))
    assert "fine-tuning b" in said
    assert "fine-tuning a" not in said


def test_what_another_process_is_at_work_on_comes_last(study_file: Path, made_data: Path, tmp_path: Path) -> None:
    (tmp_path / "distil.yaml").write_text(yaml.safe_dump(distil_recipe(made_data).model_dump(mode="json")))
    rows = {
        "a": {"title": "a", "timed_only": True, "init": "distilled"},
        "b": {"title": "b", "timed_only": True},
        "c": {"title": "c", "timed_only": True},
    }
    distil = {"distilled": str(tmp_path / "distil.yaml")}
    study = load_study(changed(study_file, tmp_path, rows=rows, distil=distil, reference="b", student="", marks={}))
    said: list[str] = []
    other = ExitStack()

    def say(line: str) -> None:
        said.append(line)
        if line == "fine-tuning c":
            other.close()

    # What `a` begins with, and `b` itself.
    for name in ("distilled", "row-b"):
        other.enter_context(locked(tmp_path / "run" / f"{name}.lock"))
    outcome = run_study(study, Setting(tmp_path / "run", tmp_path / "cache", "dev", "c", say, budget=Budget(1, 1)))
    begun = [line for line in said if line.startswith(("distilling", "fine-tuning"))]
    assert begun == ["fine-tuning c", "distilling distilled", "fine-tuning a", "fine-tuning b"]
    assert list(outcome.rows) == ["a", "b", "c"]


def test_a_damaged_teacher_ends_a_comparison(study_file: Path, tmp_path: Path) -> None:
    setting = Setting(tmp_path / "run", tmp_path / "cache", "dev", "c", lambda _: None, teacher=tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="nowhere"):
        run_study(load_study(study_file), setting)


def test_a_study_that_distils_an_edge_student_is_refused(study_file: Path, made_data: Path, tmp_path: Path) -> None:
    (tmp_path / "edge.yaml").write_text(yaml.safe_dump(distil_recipe(made_data, shape="edge").model_dump(mode="json")))
    with pytest.raises(RecipeError, match="distils an edge student"):
        load_study(changed(study_file, tmp_path, distil={"distilled": str(tmp_path / "edge.yaml")}))
