"""Data folders and runs that several files of tests share; one thread, so that sums have one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from model_store import LocalStore, Manifest
from model_store.inference import open_session
from tests.training.chain import Chain, distil_recipe, pretrain_recipe
from tests.training.made_data import tiny_recipe, write_data
from training import run as run_module
from training.distil import distil
from training.export import export
from training.objectives import soft_targets
from training.pretrain import pretrain
from training.recipe import Recipe


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _still_one_thread() -> Iterator[None]:
    """Commands take all cores; what is compared bit by bit afterwards must not notice."""
    yield
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class TinyRun:
    """A finished run and the terms of the loss of each of its steps."""

    recipe: Recipe
    folder: Path
    cache: Path
    terms: list[dict[str, float]]

    @property
    def losses(self) -> list[float]:
        return [term["total"] for term in self.terms]


def train_tiny(recipe: Recipe, folder: Path, cache: Path) -> TinyRun:
    """Train to the end, taking note of every step's loss."""
    terms: list[dict[str, float]] = []
    step = run_module._step

    def noted(*arguments: object) -> dict[str, float]:
        terms.append(step(*arguments))
        return terms[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_step", noted)
        run_module.train(recipe, folder, cache)
    return TinyRun(recipe, folder, cache, terms)


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up voices."""
    return write_data(tmp_path_factory.mktemp("made-data"))


@pytest.fixture(scope="session")
def made_run(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny recipe, trained on made-up voices."""
    work = tmp_path_factory.mktemp("made-run")
    return train_tiny(tiny_recipe(made_data), work / "run", work / "cache")


@pytest.fixture(scope="session")
def shared_run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny recipe, trained on real recordings."""
    work = tmp_path_factory.mktemp("shared-run")
    return train_tiny(tiny_recipe(shared_data), work / "run", work / "cache")


@pytest.fixture(scope="session")
def made_draft(made_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The draft exported from `made_run`; for reading only."""
    folder = tmp_path_factory.mktemp("made-draft")
    return folder, export(made_run.folder, folder, name="tiny")


@pytest.fixture(scope="session")
def chain(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Made with the recipes of `chain.py`; for reading only."""
    work = tmp_path_factory.mktemp("chain")
    teacher = pretrain(pretrain_recipe(made_data), work / "teacher", work / "cache")
    distilled = distil(distil_recipe(made_data), work / "distilled", work / "cache", teacher=str(teacher))
    return Chain(made_data, work / "cache", teacher, distilled)


@pytest.fixture(params=["made", "shared"])
def tiny_run(request: pytest.FixtureRequest) -> TinyRun:
    """The tiny run on made-up voices and, where they are, on real recordings."""
    run: TinyRun = request.getfixturevalue(f"{request.param}_run")
    return run


@pytest.fixture
def reference(made_draft: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny bundle in a store that stands for the built-in one."""
    folder, manifest = made_draft
    LocalStore(tmp_path).publish(manifest, {name: (folder / name).read_bytes() for name in manifest.files})
    monkeypatch.setattr(soft_targets, "builtin_store_path", lambda: tmp_path)
    return "tiny@1"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[onnx.NodeProto]]:
    """Of a graph, the nodes that ONNX Runtime computes once `open_session` has loaded it."""
    made, path = onnxruntime.SessionOptions, tmp_path / "loaded.onnx"

    def options() -> onnxruntime.SessionOptions:
        found = made()
        found.optimized_model_filepath = str(path)
        return found

    def load(graph: bytes) -> list[onnx.NodeProto]:
        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime, "SessionOptions", options)
            open_session(graph, threads=1)
        return list(onnx.load(path).graph.node)

    return load
