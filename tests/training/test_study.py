"""A study from recipe to page, on made voices; and the page on figures that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.training.chain import distil_recipe, pretrain_recipe, tune_recipe
from training import study as study_module
from training.distil import DistilRecipe
from training.errors import RecipeError
from training.evaluation.page import comparison, explained, grid, marks, shared, table, write_page
from training.evaluation.report import Figure
from training.outcome import Measured, Outcome, Section, Shared
from training.plan import (
    Budget,
    StudyRecipe,
    distillation,
    join_studies,
    load_study,
    only_rows,
    tuning,
)
from training.recipe import read_recipe
from training.study import Setting, run_study
from training.trainer import losses_of


def figures(accuracy: float, eer: float, parameters: float, ms: float) -> list[Figure]:
    return [
        Figure("keywords top-1", accuracy, "%", "95 % interval 80.0 to 90.0, n = 100"),
        Figure("sv EER", eer, "%", "10 target trials"),
        Figure("parameters", parameters, "M"),
        Figure("multiply-accumulates", parameters * 50, "M"),
        Figure("one second of audio, one thread", ms, "ms"),
    ]


OUTCOME = Outcome(
    title="A study",
    intro="",
    command="sotto study x.yaml",
    split="dev",
    reference="reference",
    student="student",
    rows={
        "reference": Measured("the reference", figures(90, 5, 10, 8), {"sv": [(0.01, 0.2), (0.05, 0.05), (0.2, 0.01)]}),
        "student": Measured("the student", figures(89.9, 5.9, 2.5, 2), {"sv": [(0.05, 0.06)]}),
        "broken": Measured("the broken one", [], {}, "no | memory\nleft"),
    },
)


def test_the_student_is_compared_with_the_reference() -> None:
    lines = comparison(OUTCOME)
    assert lines[-1] == "| the student | the reference | 75.0 % | 75.0 % | 75.0 % | -0.10 | +0.90 |"
    assert not any("broken" in line for line in lines)


def test_a_row_is_compared_with_the_one_that_it_names() -> None:
    noisy = [Figure("asc top-1", 90.0, "%"), Figure("asc top-1, dry, 10 dB", 70.0, "%")]
    better = [Figure("asc top-1", 88.0, "%"), Figure("asc top-1, dry, 10 dB", 80.0, "%")]
    rows = {
        **OUTCOME.rows,
        "clean": replace(OUTCOME.rows["student"], figures=[*figures(80, 8, 2.5, 2), *noisy], title="clean"),
        "robust": Measured("robust", [*figures(85, 7, 2.5, 2), *better], {}, against="clean"),
        "alone": Measured("alone", figures(85, 7, 2.5, 2), {}, against="broken"),
        "cut": Measured("cut", figures(85, 7, 2.5, 2), {}, against="what was left out"),
    }
    lines = comparison(replace(OUTCOME, rows=rows), ["robust", "alone", "cut"])
    assert lines[1] == "### Compared"
    assert lines[3].endswith("| accuracy, points | `asc`, points | EER, points | `asc` lost at 10 dB |")
    assert lines[5] == "| robust | clean | 0.0 % | 0.0 % | 0.0 % | +5.00 | -2.00 | -1.00 | 8.00, not 20.00 |"
    assert lines[6:] == ["", "the broken one failed, so alone is not compared with it."]


def test_the_table_has_intervals_and_says_what_failed() -> None:
    lines = table(OUTCOME)
    assert lines[2].startswith("| the reference | 90.00 (80.0 to 90.0) | 5.00 | 10.00 |")
    assert lines[4].startswith("| the broken one | failed: no / memory |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_columns_that_nobody_has_are_left_out() -> None:
    assert "Cllr" not in table(OUTCOME)[0]


def test_only_columns_that_are_there_are_explained() -> None:
    assert explained(OUTCOME) == ["Intervals are 95 % (Wilson).", ""]
    timed = replace(OUTCOME.rows["student"], figures=[Figure("trunk alone, one thread", 1.0, "ms")])
    said = explained(replace(OUTCOME, rows={"student": timed}, machine="2 cores of X"))
    assert said == [
        "Times are medians for one second of audio, a batch of one, on 2 cores of X.",
        "`trunk alone` is without any head.",
        "",
    ]


def test_marks_are_met_or_missed() -> None:
    """Three quarters smaller and faster, 0.1 points less accurate, 0.9 more errors."""
    wanted = {"smaller": 75.0, "faster": 80.0, "accuracy": 0.05, "eer": 1.0}
    lines = marks(replace(OUTCOME, marks=wanted))
    assert [line.rsplit("|", 2)[1].strip() for line in lines[-4:]] == ["met", "missed", "missed", "met"]
    assert "| at least 75 | 75.00 |" in lines[-4]
    assert marks(OUTCOME) == []
    assert marks(replace(OUTCOME, student="")) == []
    assert marks(replace(OUTCOME, marks=wanted, student="broken")) == []


def test_without_a_reference_nothing_is_compared() -> None:
    rows = {**OUTCOME.rows, "reference": OUTCOME.rows["broken"]}
    lines = comparison(replace(OUTCOME, rows=rows))
    assert lines == ["", "the broken one failed, so the student is not compared with it."]


def test_the_page_names_the_command_and_has_its_plots(tmp_path: Path) -> None:
    write_page(OUTCOME, tmp_path / "docs/page.md")
    text = (tmp_path / "docs/page.md").read_text()
    assert "    sotto study x.yaml" in text
    for name in ("det", "size", "latency"):
        assert f"(page-{name}.png)" in text
        assert (tmp_path / f"docs/page-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_of_timings_alone_does_not_speak_of_recordings(tmp_path: Path) -> None:
    rows = {"reference": Measured("timed", [Figure("parameters", 94.0, "M")], {})}
    write_page(replace(OUTCOME, rows=rows, marks={}), tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| timed | 94.00 |" in text
    assert "Measured by" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


JOINED = replace(
    OUTCOME,
    student="",
    sections=[
        Section("First paper", "What it is.", ["reference", "broken"]),
        Section("Second", "", ["student"], "As tried."),
    ],
    shared=[Shared(["reference", "student"], 10.0, [0.1, 0.1], [0.4, 0.4], [("reference", "student", 0.95)], 0.9)],
)


@pytest.mark.parametrize("outcome", [OUTCOME, JOINED])
def test_figures_are_read_as_they_were_written(tmp_path: Path, outcome: Outcome) -> None:
    outcome.write(tmp_path)
    assert Outcome.read(tmp_path) == outcome


def test_each_study_has_its_own_table(tmp_path: Path) -> None:
    write_page(JOINED, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    first, second = text.split("## First paper")[1].split("## Second")
    assert "What it is." in first
    assert "| the reference |" in first
    assert "| the broken one | failed" in first
    assert "| the student |" not in first
    assert "| the student | 89.90" in second
    assert "\nAs tried.\n" in second
    assert "| the student | the reference | 75.0 % |" in second
    assert "## Compared" not in text.replace("### Compared", "")


def test_tasks_on_one_backbone_are_weighed_against_students_of_their_own() -> None:
    lines = shared(JOINED, JOINED.shared[0])
    # 10 + 2 x 0.1 + 2 x 0.4 against 2 x 10 + 2 x 0.4
    assert any("11.00 MB for all of them together, 20.80 MB for 2 students" in line for line in lines)
    assert lines[-1] == "| the reference | the student | 0.950 |"
    assert any(line.endswith("would have a cosine of 0.900.") for line in lines)


def test_a_grid_is_shown_where_it_was_measured() -> None:
    clean, noisy = (
        Figure(f"asc top-1, dry, {level}", value, "%") for level, value in (("no noise", 90), ("10 dB", 80))
    )
    one = replace(OUTCOME.rows["student"], figures=[clean, noisy])
    assert grid(one) == []
    both = [
        clean, noisy, Figure("asc top-1, worst speaker", 5.0, "%"), Figure("sv EER, asc", 3.0, "%"),
        Figure("sv EER, dry, 10 dB", 20.0, "%"),
    ]  # fmt: skip
    assert grid(replace(one, figures=both)) == []
    found = grid(replace(one, figures=[*both, Figure("asc top-1, reverberant, no noise", 70.0, "%")]))
    assert not any("worst" in line or "| asc |" in line for line in found)
    assert "| dry | 90.00 | - | 80.00 | - | - |" in found
    assert "| reverberant | 70.00 | - | - | - | - |" in found


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no figures"):
        Outcome.read(tmp_path)


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
    assert list(cut.rows) == ["reference", "student", "pruned-80", "star"]
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
    monkeypatch.setattr(study_module, "evaluate", None)
    assert run_study(joined, setting, sections).rows["tuned"].value("keywords top-1") >= 0


def test_a_study_that_distils_an_edge_student_is_refused(study_file: Path, made_data: Path, tmp_path: Path) -> None:
    (tmp_path / "edge.yaml").write_text(yaml.safe_dump(distil_recipe(made_data, shape="edge").model_dump(mode="json")))
    with pytest.raises(RecipeError, match="distils an edge student"):
        load_study(changed(study_file, tmp_path, distil={"distilled": str(tmp_path / "edge.yaml")}))
