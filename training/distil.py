"""A student learns to predict a frozen teacher's layers (Kerpicci et al. 2023, section 2.1; Chang et al. 2022).

No label is read: every recording counts. `shape: distilhubert` cuts the student out of the teacher;
`shape: edge` keeps its own log-mel front end and predicts the teacher's frames at its own frames' centres.
Prediction heads stay in the run folder; what is handed on has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from training.cuts import AudioRecipe, Batches, Waves
from training.errors import TeacherError
from training.feature_cache import CachedTeacher
from training.objectives.distillation import distillation_loss
from training.pretrain import save_teacher
from training.students.distil import PredictionHeads, student_of
from training.students.edge import FRAME_HOP, Edge, EdgeShape
from training.teachers import HiddenStates, SelfSupervised, Teacher, at_centres, load_teacher
from training.trainer import Job, Schedule, Watched, fit, is_finished, to_device

WATCHED_BATCHES = 8

# What a teacher says about a batch.
Judge = Callable[[Waves], HiddenStates]


class DistilRecipe(AudioRecipe):
    """The whole file. The papers' target layers are 4, 8 and 12 of 12."""

    teacher: str = ""
    shape: Literal["distilhubert", "edge"] = "distilhubert"
    layers: int = Field(default=2, gt=0)
    edge: EdgeShape = EdgeShape()
    targets: tuple[int, ...] = (4, 8, 12)
    # Of the schedule's rate, for the CNN that was copied from the teacher (s3prl: 0.1).
    cnn_rate: float = Field(default=0.1, ge=0, le=1)
    # Up to so much of the teacher's target layers is kept on disk, in the cache folder; 0 keeps nothing.
    feature_cache_gb: float = Field(default=0.0, ge=0)
    schedule: Schedule


class Distillation(nn.Module):
    """A student of the teacher's own kind with its prediction heads."""

    def __init__(
        self, student: SelfSupervised, teacher: Teacher, targets: Sequence[int], judge: Judge | None = None
    ) -> None:
        super().__init__()
        _check_targets(targets, teacher)
        self.student = student
        self.heads = PredictionHeads(student.width, targets, teacher.width)
        # In a function, out of the module's sight: neither saved nor counted nor trained.
        self._judge = judge or _at_once(teacher)

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        wanted = self._judge(batch.as_recorded)
        found = self.student(batch.waveform, batch.lengths)
        loss = distillation_loss(self.heads(found.hidden[-1]), wanted.hidden, self.heads.targets, found.mask)
        return {"total": loss}


class EdgeDistillation(nn.Module):
    """The edge student: its frames are 50 ms apart, so the teacher's are interpolated at their centres."""

    def __init__(self, student: Edge, teacher: Teacher, targets: Sequence[int], judge: Judge | None = None) -> None:
        super().__init__()
        _check_targets(targets, teacher)
        self.student = student
        self.heads = PredictionHeads(2 * student.shape.task_width, targets, teacher.width)
        self._judge = judge or _at_once(teacher)
        self._timing = (teacher,)

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        teacher = self._timing[0]
        wanted = self._judge(batch.as_recorded)
        found = self.student(batch.waveform, batch.lengths)
        centres = torch.arange(found.frames.shape[1]) * float(FRAME_HOP)
        at = [
            at_centres(hidden, teacher, centres) if layer in self.heads.targets else hidden
            for layer, hidden in enumerate(wanted.hidden)
        ]
        # Where a frame's centre lies past the clip's last whole teacher frame, nothing is known of it.
        last = batch.lengths - teacher.reach / 2
        known = found.mask & (centres.to(last.device)[None, :] <= last[:, None])
        loss = distillation_loss(self.heads(found.frames), at, self.heads.targets, known)
        return {"total": loss}


def distil(
    recipe: DistilRecipe, folder: Path, cache_folder: Path, *, teacher: str | None = None, stop_after: int | None = None
) -> Path:
    """Distil into `folder`; returns it. A finished `distilhubert` student lies in `folder/model` in the
    transformers format, a finished edge in `folder/edge.pt`. Raises TrainingError."""
    source = teacher or recipe.teacher
    if not source:
        raise TeacherError("no teacher: give --teacher, a hub name or a folder, or name one in the recipe")
    loaded = load_teacher(source)
    batches, watched, digests = recipe.sources(cache_folder)
    torch.manual_seed(recipe.seed)
    judge = None
    if recipe.feature_cache_gb:
        judge = CachedTeacher(loaded, recipe.targets, cache_folder / "features", int(recipe.feature_cache_gb * 1e9))
    stage = build(recipe, loaded, judge)
    job = Job(
        stage=stage,
        source=batches,
        schedule=recipe.schedule,
        seed=recipe.seed,
        folder=folder,
        identity={"recipe": recipe.identity(), "data": digests, "teacher": source},
        watch=None if watched is None else lambda stage: _look(stage, watched),
        rates=(("student.model.feature_extractor.", recipe.cnn_rate),) if recipe.shape == "distilhubert" else (),
    )
    fit(job, stop_after=stop_after)
    if is_finished(folder):
        if isinstance(stage, Distillation):
            save_teacher(stage.student, folder / "model")
        else:
            torch.save(stage.student.state_dict(), folder / "edge.pt")
    return folder


def build(recipe: DistilRecipe, teacher: Teacher, judge: Judge | None = None) -> Distillation | EdgeDistillation:
    """The student before its first step. Raises TeacherError where recipe and teacher do not fit."""
    if recipe.shape == "edge":
        return EdgeDistillation(Edge(2, recipe.edge), teacher, recipe.targets, judge)
    return Distillation(student_of(teacher, layers=recipe.layers), teacher, recipe.targets, judge)


def _at_once(teacher: Teacher) -> Judge:
    return lambda batch: teacher.to(batch.waveform.device)(batch.waveform, batch.lengths)


def _check_targets(targets: Sequence[int], teacher: Teacher) -> None:
    beyond = [target for target in targets if not 0 <= target <= teacher.layers]
    if beyond or not targets:
        raise TeacherError(f"targets are {list(targets)}; the teacher has layers 0 to {teacher.layers}")


@torch.no_grad()
def _look(stage: nn.Module, batches: Batches) -> Watched:
    stage.eval()
    device = next(stage.parameters()).device
    losses = []
    for number in range(WATCHED_BATCHES):
        batch = batches[number]
        losses.append(float(stage(to_device(batch, device), 0)["total"]))
    loss = sum(losses) / len(losses)
    return Watched(-loss, {"loss": loss})
