"""What the commands of the training package say when something is wrong, and what a few of them write."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from model_store.store import open_bundle
from tests.training.conftest import TinyRun
from tests.training.test_corpora import tone
from tests.training.test_page import OUTCOME
from training import calibrate as calibrate_module
from training.calibrate import bundle_of
from training.cli import app
from training.errors import TrainingError
from training.export import write_draft


def sotto(*words: object) -> tuple[int, str]:
    """(exit code, all that was printed)."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.mark.parametrize("command", ["train", "pretrain", "distil", "finetune", "study"])
def test_a_recipe_that_is_not_there_is_one_line_and_exit_1(command: str, tmp_path: Path) -> None:
    code, said = sotto(command, tmp_path / "none.yaml")
    assert code == 1
    assert said.startswith("error: ")
    assert "none.yaml" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["pretrain", "distil", "finetune", "study"])
def test_a_recipe_of_another_kind_names_what_is_wrong(command: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\ncolour: blue\n")
    code, said = sotto(command, tmp_path / "x.yaml")
    assert code == 1
    assert "colour" in said


def test_an_onnx_file_without_its_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    code, said = sotto("evaluate", tmp_path / "model.onnx")
    assert code == 1
    assert "nothing says what its outputs mean" in said


def test_a_run_that_is_not_finished_is_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"recipe": {"name": "x"}}')
    code, said = sotto("evaluate", tmp_path)
    assert code == 1
    assert "not finished" in said


@pytest.fixture
def run(made_run: TinyRun, tmp_path: Path) -> Path:
    """A finished run without a bundle."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "student.pt"):
        (folder / name).write_bytes((made_run.folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("timed_before", [False, True])
def test_a_run_is_exported_and_calibrated_once(
    run: Path, made_data: Path, monkeypatch: pytest.MonkeyPatch, timed_before: bool
) -> None:
    """A draft that was made for its timings only is calibrated when it is to be measured."""
    calibrated: list[Path] = []

    def fit(draft: Path, **_: object) -> None:
        calibrated.append(draft)
        manifest = open_bundle(draft).manifest
        known = manifest.speaker.calibration.model_copy(update={"fitted_on": "made voices"})
        speaker = manifest.speaker.model_copy(update={"calibration": known})
        write_draft(draft, manifest.model_copy(update={"speaker": speaker}), {})

    monkeypatch.setattr(calibrate_module, "calibrate", fit)
    if timed_before:
        bundle_of(run, made_data, say=lambda _: None, fitted=False)
        assert calibrated == []
    for _ in range(2):
        code, said = sotto("evaluate", run, "--data", made_data, "--row", "cost")
        assert (code, "multiply-accumulates" in said) == (0, True)
    assert len(calibrated) == 1
    assert open_bundle(run / "bundle").manifest.name == "sotto-tiny"


def test_a_run_is_measured_in_noise_and_rooms(run: Path, made_data: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages/robust.md"
    code, said = sotto("evaluate", run, "--data", made_data, "--robust", "--page", page)
    assert code == 0, said
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:4]] == ["dry", "reverberant"]
    assert len(rows) == 2 + 2 + 3
    assert page.with_suffix(".png").is_file()


def test_the_grid_of_noises_goes_with_nothing_else(run: Path) -> None:
    code, said = sotto("evaluate", run, "--robust", "--record")
    assert (code, "leave out" in said) == (1, True)


def test_a_run_that_cannot_be_calibrated_leaves_no_bundle(
    run: Path, made_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TrainingError("this network tells nobody apart")

    monkeypatch.setattr(calibrate_module, "calibrate", fail)
    code, said = sotto("evaluate", run, "--data", made_data, "--row", "cost")
    assert (code, "tells nobody apart" in said) == (1, True)
    assert sorted(path.name for path in run.iterdir()) == ["run.json", "student.pt"]


def test_musan_becomes_a_table(tmp_path: Path) -> None:
    tone(tmp_path / "musan/noise/a/noise-0.wav")
    code, said = sotto("corpus", "musan", tmp_path / "musan", "--out", tmp_path / "out", "--kind", "noise")
    assert (code, "1 recordings" in said) == (0, True)
    assert (tmp_path / "out/noise.csv").is_file()
    code, said = sotto("corpus", "speech-commands", tmp_path / "musan", "--out", tmp_path / "out", "--classes", "20")
    assert (code, "12 or 35" in said) == (1, True)


def test_a_page_is_written_again_from_stored_figures(tmp_path: Path) -> None:
    OUTCOME.write(tmp_path)
    code, _ = sotto("report", tmp_path, "--page", tmp_path / "page.md")
    assert code == 0
    assert "the student" in (tmp_path / "page.md").read_text()
    code, said = sotto("report", tmp_path / "nowhere")
    assert (code, "holds no figures" in said) == (1, True)
