"""A finished run of either kind, as exporting and calibrating need it: `sotto train`'s or `sotto finetune`'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from model_store import Lineage, golden
from model_store.graph import outputs_of
from training.audio_cache import SAMPLE_RATE_HZ
from training.beginning import begin_with_bundle, reference_of
from training.errors import RunError
from training.manifest import Clip, Data, read_data
from training.objectives.soft_targets import teaching_bundle
from training.recipe import Recipe
from training.run import chosen, load_student
from training.students.edge import FRAME_HOP, Edge


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run made, and from what."""

    network: nn.Module  # forward(waveform [B, N], lengths [B]) -> EdgeOutputs
    labels: list[str]
    lineage: Lineage
    frame_hop_s: float
    speaker_dim: int  # 0: it tells nobody apart
    embedding_dim: int
    layers: str  # what `embedding` and `frames` are taken from
    is_edge: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """Which data a run used, and how its calibration fold was taken out."""

    root: Path
    calibration_fraction: float
    seed: int
    choose: Callable[[list[Clip]], list[Clip]]

    def read(self, root: Path | None = None) -> Data:
        """The tables, below `root` where the data lies elsewhere by now. Raises ManifestError."""
        return read_data(root or self.root, calibration_fraction=self.calibration_fraction, seed=self.seed)


def open_run(folder: Path) -> Finished:
    """Raises RunError for a folder that is no finished run, TeacherError for damaged weights."""
    run = read_run(folder)
    if "identity" not in run:
        return _trained(folder)
    if "init" not in run["identity"]:
        raise RunError(
            f"{folder} was not fine-tuned, so there are no keywords or speakers in it: `sotto finetune` first"
        )
    return _finetuned(folder, run)


def open_published(reference: str) -> Finished:
    """The network of a built-in bundle, NAME@VERSION, once it has given the golden clip what the bundle gives. Raises
    TeacherError where there is none, RunError where its graph does not hold all of a network, StoreError."""
    bundle = teaching_bundle(reference)
    manifest = bundle.manifest
    try:
        recipe = Recipe.model_validate(manifest.lineage.recipe)
    except ValidationError as error:
        raise RunError(f"{reference_of(bundle)} was not made by `sotto train`") from error
    if recipe.shape.trunk is not None:
        raise RunError(f"{reference_of(bundle)} stands on a trunk, whose weights its graph holds otherwise")
    labels = [keyword.label for keyword in manifest.keywords.labels]
    student = Edge(1 + len(labels), recipe.shape).eval()
    begin_with_bundle(student, bundle, labels)
    waveform, expected = golden.unpack(bundle.read(manifest.golden_file), outputs_of(manifest))
    with torch.no_grad():
        out = student(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    for name, wanted in expected.items():
        golden.compare(f"{name} of {reference_of(bundle)}'s golden clip", wanted, getattr(out, name)[0].numpy())
    return _of_student(student, labels, manifest.lineage.model_copy(update={"weights_of": reference_of(bundle)}))


def read_run(folder: Path) -> dict[str, Any]:
    """What a run folder says was run. Raises RunError."""
    path = folder / "run.json"
    if not path.is_file():
        raise RunError(f"{folder} is no run folder: run.json is missing")
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run


def name_of(folder: Path) -> str:
    """What the run's recipe is called. Raises RunError."""
    run = read_run(folder)
    return str(run.get("identity", run)["recipe"]["name"])


def origin(recipe: dict[str, Any]) -> Origin:
    """Of the recipe that a bundle's lineage holds."""
    if isinstance(recipe["data"], dict):
        trained = Recipe.model_validate(recipe)
        return Origin(
            trained.data.root, trained.data.calibration_fraction, trained.seed, lambda clips: chosen(trained, clips)
        )
    from training.finetune import FinetuneRecipe

    tuned = FinetuneRecipe.model_validate(recipe)
    return Origin(
        tuned.data,
        tuned.fold,
        tuned.seed,
        lambda clips: [clip for clip in clips if tuned.corpora is None or clip.corpus in tuned.corpora],
    )


def _trained(folder: Path) -> Finished:
    student, run = load_student(folder)
    lineage = Lineage(
        recipe=run["recipe"],
        recipe_digest=run["recipe_digest"],
        data=run["data"],
        git_revision=run["git_revision"],
        seed=run["seed"],
    )
    return _of_student(student, run["labels"], lineage)


def _of_student(student: Edge, labels: list[str], lineage: Lineage) -> Finished:
    return Finished(
        network=student,
        labels=labels,
        lineage=lineage,
        frame_hop_s=FRAME_HOP / SAMPLE_RATE_HZ,
        speaker_dim=student.shape.speaker_dim,
        embedding_dim=student.shape.embedding_dim,
        layers=(
            "last keyword block and last speaker block, side by side"
            if student.shape.tells_speakers
            else "last keyword block"
        ),
        is_edge=True,
    )


def _finetuned(folder: Path, run: dict[str, Any]) -> Finished:
    from training.finetune import load_joint

    model, labels = load_joint(folder)
    identity = run["identity"]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Finished(
        network=model,
        labels=labels,
        lineage=Lineage(
            recipe={**identity["recipe"], "data": run["data_root"], "init": identity["init"]},
            recipe_digest=digest,
            data=identity["data"],
            git_revision=run["git_revision"],
            seed=identity["seed"],
        ),
        frame_hop_s=model.trunk.hop / SAMPLE_RATE_HZ,
        speaker_dim=model.speaker_dim,
        embedding_dim=model.trunk.width,
        layers="last layer of the trunk",
        is_edge=False,
    )
