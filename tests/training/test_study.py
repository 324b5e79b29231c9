"""A study from recipe to page, on made voices; and the page on figures that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.training.chain import distil_recipe, pretrain_recipe, tune_recipe
from training.errors import RecipeError
from training.evaluation.page import comparison, table, write_page
from training.evaluation.report import Figure
from training.study import Measured, Outcome, StudyRecipe, load_study, run_study, tuning


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
    assert lines[-1] == "| the student | 75.0 % | 75.0 % | 75.0 % | -0.10 | +0.90 |"
    assert not any("broken" in line for line in lines)


def test_the_table_has_intervals_and_says_what_failed() -> None:
    lines = table(OUTCOME)
    assert lines[2].startswith("| the reference | 90.00 (80.0 to 90.0) | 5.00 | 10.00 |")
    assert lines[4].startswith("| the broken one | failed: no / memory |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_columns_that_nobody_has_are_left_out() -> None:
    assert "Cllr" not in table(OUTCOME)[0]


def test_without_a_reference_nothing_is_compared() -> None:
    rows = {**OUTCOME.rows, "reference": OUTCOME.rows["broken"]}
    assert comparison(replace(OUTCOME, rows=rows)) == ["The reference failed, so nothing is compared with it."]


def test_the_page_names_the_command_and_has_its_plots(tmp_path: Path) -> None:
    write_page(OUTCOME, tmp_path / "docs/page.md")
    text = (tmp_path / "docs/page.md").read_text()
    assert "    sotto study x.yaml" in text
    for name in ("det", "size", "latency"):
        assert f"(page-{name}.png)" in text
        assert (tmp_path / f"docs/page-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_read_as_they_were_written(tmp_path: Path) -> None:
    OUTCOME.write(tmp_path)
    assert Outcome.read(tmp_path) == OUTCOME


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
        "distil": {"distilled": str(folder / "distil.yaml")},
        "finetune": str(folder / "finetune.yaml"),
        "student": "keywords",
        "rows": {
            "reference": {"title": "reference"},
            "keywords": {"title": "keywords only", "init": "distilled", "changes": {"tasks": ["keywords"]}},
            "impossible": {"title": "too many layers", "changes": {"layers": 99}},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def changed(study_file: Path, folder: Path, **changes: object) -> Path:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(study_file.read_text()), **changes}))
    return path


def test_a_study_is_trained_measured_and_not_done_twice(study_file: Path, tmp_path: Path) -> None:
    """On `train`, since the made data has too few speakers in dev for trials."""
    study = load_study(study_file)
    said: list[str] = []

    def run() -> Outcome:
        said.clear()
        return run_study(
            study, tmp_path / "run", tmp_path / "cache", data_root=None, split="train", command="c", say=said.append
        )

    outcome = run()
    assert list(outcome.rows) == ["reference", "keywords", "impossible"]
    reference, keywords = outcome.rows["reference"], outcome.rows["keywords"]
    assert 0 <= reference.value("keywords top-1") <= 100
    assert 0 <= reference.value("sv EER") <= 100
    assert keywords.value("sv EER") != keywords.value("sv EER")  # not a number: never trained, never measured
    assert 0 < keywords.value("parameters") < reference.value("parameters")
    assert reference.value("parameters") < reference.value("parameters, training heads included")
    assert 0 < keywords.value("multiply-accumulates") < reference.value("multiply-accumulates")
    assert "99" in outcome.rows["impossible"].error
    assert "measuring sv" in said
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
        ({"teacher": "/nowhere.yaml"}, "nowhere"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_trained(
    study_file: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(changed(study_file, tmp_path, **changes))


def test_a_study_that_distils_an_edge_student_is_refused(study_file: Path, made_data: Path, tmp_path: Path) -> None:
    (tmp_path / "edge.yaml").write_text(yaml.safe_dump(distil_recipe(made_data, shape="edge").model_dump(mode="json")))
    with pytest.raises(RecipeError, match="distils an edge student"):
        load_study(changed(study_file, tmp_path, distil={"distilled": str(tmp_path / "edge.yaml")}))
