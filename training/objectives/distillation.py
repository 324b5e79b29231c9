"""Layer-wise distillation (Chang et al. 2022, eq. 1; Kerpicci et al. 2023, eq. 1).

    L = sum over target layers p of  mean over frames i of  (1/K) |f_pi - f^_pi|_1 - log sigmoid(cos(f_pi, f^_pi))

The papers sum over frames; the mean differs by a factor of the clip's length and keeps the learning rate
independent of how long the crops are (as s3prl's code does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.cuts import Waves
from training.errors import TeacherError
from training.objectives.robust import Enhancement, EnhancementRecipe
from training.students.distil import PredictionHeads
from training.students.edge import FRAME_HOP, Edge
from training.teachers import HiddenStates, SelfSupervised, Teacher, at_centres

# What a teacher says about a batch.
Judge = Callable[[Waves], HiddenStates]


def layer_loss(predicted: Tensor, target: Tensor, mask: Tensor, cosine_weight: float = 1.0) -> Tensor:
    """Frames [B, T, K] against the teacher's, mask [B, T] bool; scalar. Identical frames cost 0.3133."""
    distance = (predicted - target).abs().mean(dim=2)
    cosine = functional.cosine_similarity(predicted, target, dim=2)
    cost = distance - cosine_weight * functional.logsigmoid(cosine)
    return (cost * mask).sum() / mask.sum().clamp(min=1)


def distillation_loss(
    predictions: Sequence[Tensor], hidden: Sequence[Tensor], targets: Sequence[int], mask: Tensor
) -> Tensor:
    """Sum over the target layers; `hidden[p]` is the output of the teacher's layer p (0 is its input)."""
    losses = [layer_loss(one, hidden[layer], mask) for one, layer in zip(predictions, targets, strict=True)]
    return torch.stack(losses).sum()


class Distillation(nn.Module):
    """A student with prediction heads on its last layer, and where asked for an enhancement head."""

    def __init__(
        self,
        student: SelfSupervised,
        teacher: Teacher,
        targets: Sequence[int],
        judge: Judge,
        enhancement: EnhancementRecipe | None = None,
    ) -> None:
        super().__init__()
        check_layers(targets, teacher)
        self.student = student
        self.heads = PredictionHeads(student.width, targets, teacher.width)
        self.enhance = None if enhancement is None else Enhancement(student.width, student.hop, enhancement)
        # In a function, out of the module's sight: neither saved nor counted nor trained.
        self._judge = judge

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """The losses over all frames of the batch."""
        wanted = self._judge(batch.as_recorded)
        found = self.student(batch.waveform, batch.lengths)
        loss = distillation_loss(self.heads(found.hidden[-1]), wanted.hidden, self.heads.targets, found.mask)
        if self.enhance is None:
            return {"total": loss}
        frames = found.hidden[-1]
        if self.enhance.recipe.source == "cnn":
            frames = self.student.heard(batch.waveform, batch.lengths)[0]
        return with_enhancement(loss, self.enhance, frames, found.mask, batch)


class EdgeDistillation(nn.Module):
    """The edge student: its frames are 50 ms apart, so the teacher's are interpolated at their centres."""

    def __init__(
        self,
        student: Edge,
        teacher: Teacher,
        targets: Sequence[int],
        judge: Judge,
        enhancement: EnhancementRecipe | None = None,
    ) -> None:
        super().__init__()
        check_layers(targets, teacher)
        if enhancement is not None and enhancement.source == "cnn":
            raise TeacherError("the edge student is a CNN throughout; its enhancement head reads the last layer")
        width = 2 * student.shape.task_width
        self.student = student
        self.heads = PredictionHeads(width, targets, teacher.width)
        self.enhance = None if enhancement is None else Enhancement(width, FRAME_HOP, enhancement)
        self._judge = judge
        self._view = EdgeView(teacher)

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """The losses over all frames of the batch."""
        wanted = self._judge(batch.as_recorded)
        found = self.student(batch.waveform, batch.lengths)
        at = [
            self._view.at(hidden, found.mask) if layer in self.heads.targets else hidden
            for layer, hidden in enumerate(wanted.hidden)
        ]
        known = self._view.known(found.mask, batch.lengths)
        loss = distillation_loss(self.heads(found.frames), at, self.heads.targets, known)
        if self.enhance is None:
            return {"total": loss}
        return with_enhancement(loss, self.enhance, found.frames, found.mask, batch)


def with_enhancement(loss: Tensor, head: Enhancement, frames: Tensor, mask: Tensor, batch: Waves) -> dict[str, Tensor]:
    """The distillation's loss and the head's, by name."""
    enhancement = head(frames, mask, batch)
    return {"distillation": loss, "enhancement": enhancement, "total": loss + head.recipe.weight * enhancement}


class EdgeView:
    """A teacher's frames at the times of the edge student's."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def at(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The teacher's [B, T, D] at the frames [B, S] of the student's mask, -> [B, S, D]."""
        return at_centres(hidden, self._teacher, self._centres(mask))

    def known(self, mask: Tensor, lengths: Tensor) -> Tensor:
        """The mask without frames whose centre lies past the clip's last whole teacher frame."""
        last = lengths - self._teacher.reach / 2
        return mask & (self._centres(mask).to(last.device)[None, :] <= last[:, None])

    def _centres(self, mask: Tensor) -> Tensor:
        return torch.arange(mask.shape[1]) * float(FRAME_HOP)


def at_once(teacher: Teacher) -> Judge:
    """A judge that computes and keeps nothing."""
    return lambda batch: teacher.to(batch.waveform.device)(batch.waveform, batch.lengths)


def check_layers(targets: Sequence[int], teacher: Teacher) -> None:
    """Raises TeacherError where the teacher lacks one of the layers."""
    beyond = [target for target in targets if not 0 <= target <= teacher.layers]
    if beyond or not targets:
        raise TeacherError(f"targets are {list(targets)}; the teacher has layers 0 to {teacher.layers}")
