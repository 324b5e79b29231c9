"""A finished run of either kind, as exporting and calibrating need it: `sotto train`'s or `sotto finetune`'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from model_store import Lineage
from training.audio_cache import SAMPLE_RATE_HZ
from training.errors import RunError
from training.manifest import Clip, Data, read_data
from training.recipe import Recipe
from training.run import chosen, load_student
from training.students.edge import FRAME_HOP


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
    return Finished(
        network=student,
        labels=run["labels"],
        lineage=Lineage(
            recipe=run["recipe"],
            recipe_digest=run["recipe_digest"],
            data=run["data"],
            git_revision=run["git_revision"],
            seed=run["seed"],
        ),
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
