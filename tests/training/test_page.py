"""The page of a study, on figures that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from training.errors import RecipeError
from training.evaluation.page import comparison, explained, grid, made_on, marks, shared, table, write_page
from training.evaluation.report import Figure
from training.outcome import Measured, Outcome, Section, Shared


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


def test_machines_are_named_where_there_were_several() -> None:
    rows = {name: replace(row, made_on="2 cores of A") for name, row in OUTCOME.rows.items()}
    assert made_on(replace(OUTCOME, rows=rows)) == []
    rows["student"] = replace(rows["student"], made_on="8 cores of B", revision="0123456789")
    lines = made_on(replace(OUTCOME, rows=rows))
    assert "* 2 cores of A: the reference; the broken one." in lines
    assert "* 8 cores of B, code of 0123456: the student." in lines


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
