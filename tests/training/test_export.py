"""From a finished run to a bundle that the store verifies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model_store import LocalStore, Manifest, verify_bundle
from model_store.inference import open_session
from model_store.verify import read_cohort
from tests.training.conftest import TinyRun
from training.errors import ExportError, RunError
from training.export import check_graph_equals_network, export, to_onnx
from training.run import load_student


def test_published_export_verifies(tiny_run: TinyRun, tmp_path: Path) -> None:
    manifest = export(tiny_run.folder, tmp_path / "draft", name="tiny")
    files = {name: (tmp_path / "draft" / name).read_bytes() for name in manifest.files}
    bundle = LocalStore(tmp_path / "store").publish(manifest, files)
    verify_bundle(bundle)
    assert bundle.manifest.version == 1


def test_manifest_has_the_labels_of_the_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    manifest = export(tiny_run.folder, tmp_path, name="tiny")
    _, run = load_student(tiny_run.folder)
    assert [entry.label for entry in manifest.keywords.labels] == run["labels"]


def test_lineage_is_that_of_the_run(made_draft: tuple[Path, Manifest], made_run: TinyRun) -> None:
    lineage = made_draft[1].lineage
    assert lineage.recipe_digest == made_run.recipe.digest()
    assert lineage.seed == 7


def test_parameters_are_those_of_the_network(made_draft: tuple[Path, Manifest], made_run: TinyRun) -> None:
    student, _ = load_student(made_run.folder)
    assert made_draft[1].graph.parameters == sum(parameter.numel() for parameter in student.parameters())


def test_cohort_has_one_unit_vector_for_each_training_speaker(made_draft: tuple[Path, Manifest]) -> None:
    cohort = read_cohort((made_draft[0] / "cohort.f32").read_bytes(), 16)
    assert cohort.shape == (14, 16)
    assert np.linalg.norm(cohort, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_typical_durations_are_those_of_the_words(made_draft: tuple[Path, Manifest]) -> None:
    # Made words last half a second, their faint first and last tens of milliseconds apart.
    assert all(0.35 <= entry.typical_s <= 0.65 for entry in made_draft[1].keywords.labels)


def test_data_with_other_labels_is_refused(made_run: TinyRun, made_data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made_data, tmp_path / "data")
    table = other / "manifest.csv"
    table.write_text(table.read_text().replace(",high,high,", ",higher,higher,"))
    with pytest.raises(ExportError, match="labels"):
        export(made_run.folder, tmp_path / "draft", name="tiny", data_root=other)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        export(tmp_path, tmp_path / "draft", name="tiny")


def test_graph_of_another_network_is_refused(made_run: TinyRun) -> None:
    student, _ = load_student(made_run.folder)
    graph = open_session(to_onnx(student), threads=1)
    with torch.no_grad():
        student.keyword_head.bias += 0.001
    with pytest.raises(ExportError, match="keyword_logits: ONNX against torch"):
        check_graph_equals_network(graph, student)
