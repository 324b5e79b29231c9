"""Masked prediction of hidden units (Hsu et al. 2021, HuBERT): a teacher of one's own from audio without labels.

First the units are k-means clusters of MFCC frames; then clusters of a middle layer of the model that the
first pass made. The losses are in `objectives/masked.py`.

The result is a folder in the transformers format, which `load_teacher` opens like any public model.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from transformers import HubertConfig, Wav2Vec2FeatureExtractor

from training.audio_cache import SAMPLE_RATE_HZ
from training.bounds import Count, Probability
from training.cuts import AudioRecipe, Batches
from training.errors import RunError
from training.files import write_json
from training.objectives.masked import MaskedPrediction
from training.teachers import SelfSupervised, Teacher, load_teacher, model_class
from training.trainer import Job, Schedule, Watched, fit, is_finished, to_device
from training.units import HOP, WINDOW, Units

SECONDS_FOR_CLUSTERS = 6000
WATCHED_BATCHES = 8


class TeacherShape(BaseModel):
    """The encoder; the defaults are HuBERT Base (94.4 M)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: Count = 768
    layers: Count = 12
    heads: Count = 12
    feed_forward: Count = 3072
    conv_channels: Count = 512
    dropout: Probability = 0.1
    layer_drop: Probability = 0.0
    # Norms before attention and feed-forward, as in HuBERT Large, instead of after them as in Base: learns
    # much faster in the first thousands of steps.
    pre_norm: bool = False
    # Log-mel bands instead of the CNN (see `MelFrontEnd`); `conv_channels` is then the width of what follows them.
    mel: bool = False

    def config(self) -> HubertConfig:
        """A Base model: strides of 320 samples in all, normalisation over time in the first layer only."""
        config = HubertConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            conv_dim=(self.conv_channels,) * 7,
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            feat_proj_dropout=self.dropout,
            activation_dropout=0.0,
            layerdrop=self.layer_drop,
            do_stable_layer_norm=self.pre_norm,
            # Spans are drawn here, from the step's own seed.
            mask_time_prob=0.0001,
            mask_feature_prob=0.0,
        )
        config.update({"mel": self.mel})
        return config

    def untrained(self) -> SelfSupervised:
        """A CNN's first norm makes every clip equally loud; for bands the samples are normalised instead."""
        config = self.config()
        return SelfSupervised(model_class(config)(config), normalise=self.mel)


class UnitsRecipe(BaseModel):
    """One pass: clusters of MFCC where `layer` is 0, else of that layer of the pass before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(gt=1)
    layer: int = Field(default=0, ge=0)
    # HuBERT begins every pass anew; with few steps it pays to go on from the pass before.
    begin: Literal["anew", "on"] = "anew"
    schedule: Schedule


class PretrainRecipe(AudioRecipe):
    """The whole file."""

    shape: TeacherShape = TeacherShape()
    span: int = Field(default=10, gt=0)
    hidden_share: float = Field(default=0.8, gt=0, lt=1)  # of frames, if spans never overlapped
    hidden_weight: float = Field(default=1.0, gt=0, le=1)
    passes: tuple[UnitsRecipe, ...] = Field(min_length=1)


def pretrain(recipe: PretrainRecipe, folder: Path, cache_folder: Path, *, stop_after: int | None = None) -> Path:
    """All passes, each in its own folder below `folder`; returns the folder of the teacher.

    A pass that is finished is not run again. `stop_after` ends the running pass at that step. Raises TrainingError.
    """
    source, watched, digests = recipe.sources(cache_folder)
    identity = {"recipe": recipe.identity(), "data": digests}

    def run(stage: nn.Module, schedule: Schedule, seed: int, own: Path) -> bool:
        """Whether the stage is finished."""
        job = Job(
            stage=stage,
            source=source,
            schedule=schedule,
            seed=seed,
            folder=own,
            identity={**identity, "stage": own.name},
            same_recipe=recipe.says_the_same,
            watch=None if watched is None else partial(_look, batches=watched),
        )
        fit(job, stop_after=stop_after)
        return is_finished(own)

    teacher: Teacher | None = None
    for number, units_recipe in enumerate(recipe.passes, start=1):
        own = folder / f"pass-{number}"
        units = Units(_centres(units_recipe, recipe, source, teacher, own), teacher, units_recipe.layer)
        torch.manual_seed(recipe.seed + number)
        trunk = recipe.shape.untrained()
        if units_recipe.begin == "on" and teacher is not None:
            trunk.load_state_dict(teacher.state_dict())
        stage = MaskedPrediction(
            trunk,
            units_recipe.clusters,
            units,
            span=recipe.span,
            share=recipe.hidden_share,
            hidden_weight=recipe.hidden_weight,
        )
        if not run(stage, units_recipe.schedule, recipe.seed + number, own):
            return own
        save_teacher(trunk, own / "model")
        teacher = load_teacher(str(own / "model"))
    return folder / f"pass-{len(recipe.passes)}" / "model"


def save_teacher(trunk: SelfSupervised, folder: Path) -> None:
    """In the transformers format, with the preprocessor's file that says how input is normalised."""
    trunk.model.save_pretrained(folder)
    extractor: Any = Wav2Vec2FeatureExtractor
    extractor(do_normalize=trunk.normalise, sampling_rate=SAMPLE_RATE_HZ).save_pretrained(folder)


def publish_teacher(teacher: Path, out: Path) -> None:
    """A copy of the teacher in `teacher` for others to distil from: weights in half precision, and `made.json`, which
    says from which recipe, data, seed and code they came. Raises RunError where `out` exists, TeacherError."""
    if out.exists():
        raise RunError(f"{out} exists; a teacher that something may have been distilled from is not replaced")
    found = load_teacher(str(teacher))
    model: Any = found.model
    save_teacher(SelfSupervised(model.half(), normalise=found.normalise), out)
    write_json(json.loads((teacher.parent / "run.json").read_text(encoding="utf-8")), out / "made.json")


def _centres(
    units: UnitsRecipe,
    recipe: PretrainRecipe,
    source: Batches,
    teacher: Teacher | None,
    folder: Path,
) -> npt.NDArray[np.float32]:
    """k-means of the pass, made once and kept beside its checkpoints. Raises RunError."""
    path = folder / "units.npz"
    if path.is_file():
        with np.load(path) as kept:
            return np.asarray(kept["centres"], dtype=np.float32)
    if units.layer and teacher is None:
        raise RunError("the first pass has no model before it whose layer could be clustered; set its layer to 0")
    extractor = Units(np.zeros((1, 1), dtype=np.float32), teacher, units.layer)
    rows, seconds = [], 0.0
    for batch in source.epoch():
        features = extractor.features(batch.as_recorded)
        for row, length in enumerate(batch.lengths.tolist()):
            rows.append(features[row, : max(1, (length - WINDOW) // HOP + 1)].numpy())
        seconds += float(batch.lengths.sum()) / SAMPLE_RATE_HZ
        if seconds >= SECONDS_FOR_CLUSTERS:
            break
    frames = np.concatenate(rows)
    means = MiniBatchKMeans(
        units.clusters, batch_size=10_000, n_init=3, max_iter=100, random_state=recipe.seed, reassignment_ratio=0.0
    )
    means.fit(frames)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "units.partial.npz"
    np.savez(unfinished, centres=means.cluster_centers_.astype(np.float32))
    unfinished.replace(path)
    used = len(np.unique(means.predict(frames[:: max(1, len(frames) // 50_000)])))
    report = {"frames": len(frames), "clusters": units.clusters, "used": used, "layer": units.layer}
    (folder / "units.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return np.asarray(means.cluster_centers_, dtype=np.float32)


@torch.no_grad()
def _look(stage: nn.Module, batches: Batches) -> Watched:
    """The losses on the fold's first batches, always with the same hidden spans."""
    stage.eval()
    sums: dict[str, float] = {}
    for number in range(WATCHED_BATCHES):
        torch.manual_seed(number)
        device = next(stage.parameters()).device
        batch = batches[number]
        terms = stage(to_device(batch, device), 0)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) / WATCHED_BATCHES
    return Watched(-sums.get("hidden", sums["total"]), sums)
