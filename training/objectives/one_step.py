"""OS-KDFT: distillation and fine-tuning for speakers in one step, on one trunk (Heo et al. 2023).

The distillation's pass leaves the adapters out, the task's pass has them. Two generations are public:

    a (the paper)     L = 100 (1 - e/E) MSE(h_S, h_T) + L_AAM,  h the last layers; the teacher hears the clean crop
                      whose corrupted version the student hears in both passes
    b (code of 2024)  L = sum over layers p of [ mean |f_p - f^_p| - sum over frames of log sigmoid(cos(f_p, f^_p)) ]
                      + L_CE;  the distillation's audio is the unlabelled set, and with probability e/E the target's

e/E is the share of the schedule that has passed. As in the code, the cosine's part of b is summed over frames,
which makes it most of the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache
from training.batches import Batch, BatchSource
from training.cuts import Waves
from training.errors import RunError
from training.manifest import Clip
from training.objectives.distillation import check_layers
from training.students.distil import PredictionHeads
from training.students.joint import JointModel
from training.teachers import Teacher


class OneStepRecipe(BaseModel):
    """`weight` is 100 for `a`, 1 for `b`, as published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: Literal["a", "b"] = "b"
    teacher: str = ""
    weight: float = Field(default=1.0, gt=0)
    targets: tuple[int, ...] = (4, 8, 12)
    # For `b`: what the distillation hears at first (all corpora where none is named), and how much of it at once.
    corpora: tuple[str, ...] | None = None
    crop_s: float = Field(default=3.0, gt=0.1)


class OneStep(nn.Module):
    """The distillation's half of a step; prediction heads (of `b`) are left behind."""

    def __init__(self, model: JointModel, teacher: Teacher, recipe: OneStepRecipe, steps: int) -> None:
        super().__init__()
        self.recipe = recipe
        self._steps = steps
        # Out of the module's sight: the one is trained elsewhere, the other never.
        self._others = (model, teacher)
        check_layers(recipe.targets, teacher)
        if recipe.generation == "a" and model.trunk.width != teacher.width:
            raise RunError(f"generation a compares frames as they are: {model.trunk.width} channels, {teacher.width}")
        self.heads = (
            PredictionHeads(model.trunk.width, recipe.targets, teacher.width) if recipe.generation == "b" else None
        )

    def forward(self, batch: Batch, step: int) -> Tensor:
        """The weighted loss of this step."""
        model, teacher = self._others
        teacher.to(batch.waveform.device)
        heard, recorded = self._audio(batch)
        wanted = teacher(recorded.waveform, recorded.lengths)
        if model.adapters is None:
            found = model.trunk(heard.waveform, heard.lengths)
        else:
            with model.adapters.off():
                found = model.trunk(heard.waveform, heard.lengths)
        inside = found.mask[:, :, None]
        if self.heads is None:
            squares = (found.hidden[-1].float() - wanted.hidden[-1].float()).square() * inside
            loss: Tensor = squares.sum() / (inside.sum() * squares.shape[2])
            return loss * (self.recipe.weight * (1 - step / self._steps))
        losses = []
        for layer, predicted in zip(self.recipe.targets, self.heads(found.hidden[-1]), strict=True):
            target = wanted.hidden[layer].float()
            distance = ((predicted.float() - target).abs() * inside).sum() / (inside.sum() * target.shape[2])
            cosine = functional.cosine_similarity(predicted.float(), target, dim=2)
            losses.append(distance - (functional.logsigmoid(cosine) * found.mask).sum(dim=1).mean())
        return self.recipe.weight * torch.stack(losses).sum()

    def _audio(self, batch: Batch) -> tuple[Waves, Waves]:
        """What the student hears and what the teacher hears."""
        if self.recipe.generation == "a":
            assert batch.clean is not None
            return Waves(batch.waveform, batch.lengths), Waves(batch.clean, batch.lengths)
        assert batch.unlabelled is not None
        assert batch.unlabelled_lengths is not None
        both = Waves(batch.unlabelled, batch.unlabelled_lengths)
        return both, both


class MigratingSource:
    """Batches with audio for the distillation beside the labelled crops: from `unlabelled` at first, with
    probability e/E from `target`."""

    def __init__(
        self,
        labelled: BatchSource,
        unlabelled: Sequence[Clip],
        target: Sequence[Clip],
        cache: AudioCache,
        *,
        crop_s: float,
        steps: int,
        parts: int,
        seed: int,
    ) -> None:
        if not unlabelled:
            raise RunError("no recording is left for the distillation's half")
        self._labelled, self._unlabelled, self._target = labelled, list(unlabelled), list(target)
        self._cache, self._size = cache, int(crop_s * SAMPLE_RATE_HZ)
        self._steps, self._parts, self._seed = steps, parts, seed
        self.speaker_classes = labelled.speaker_classes
        self.speakers = labelled.speakers

    def __getitem__(self, number: int) -> Batch:
        batch = self._labelled[number]
        rng = np.random.default_rng((self._seed, number, 1))
        progress = number / self._parts / self._steps
        crops = [self._crop(rng, progress) for _ in range(len(batch.lengths))]
        return replace(
            batch,
            unlabelled=nn.utils.rnn.pad_sequence(crops, batch_first=True),
            unlabelled_lengths=torch.tensor([len(crop) for crop in crops]),
        )

    def _crop(self, rng: np.random.Generator, progress: float) -> Tensor:
        pool = self._target if rng.random() < progress else self._unlabelled
        path = pool[int(rng.integers(len(pool)))].path
        begin = int(rng.integers(max(1, self._cache.length(path) - self._size)))
        return torch.from_numpy(self._cache.read(path, begin, begin + self._size))
