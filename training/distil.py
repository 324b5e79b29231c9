"""A student learns to predict a frozen teacher's layers (Kerpicci et al. 2023, section 2.1; Chang et al. 2022).

No label is read: every recording counts. `shape: distilhubert` cuts the student out of the teacher; `thin` is
as deep as it and narrower; `edge` keeps its own log-mel front end and hears the teacher at its own frames'
centres. `objective: layers` predicts chosen layers, `relations` is STaR's (`objectives/star.py`).
Prediction heads stay in the run folder; what is handed on has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from training.cuts import AudioRecipe, Batches
from training.errors import TeacherError
from training.feature_cache import CachedTeacher
from training.objectives.distillation import Distillation, EdgeDistillation, Judge, at_once
from training.objectives.robust import EnhancementRecipe
from training.objectives.star import EdgeStarDistillation, StarDistillation, StarRecipe
from training.pretrain import save_teacher
from training.students.distil import student_of
from training.students.edge import Edge, EdgeShape
from training.students.thin import ThinShape, thin_student
from training.teachers import Teacher, load_teacher
from training.trainer import Job, Schedule, Watched, fit, is_finished, to_device

WATCHED_BATCHES = 8

Stage = Distillation | EdgeDistillation | StarDistillation | EdgeStarDistillation


class DistilRecipe(AudioRecipe):
    """The whole file. The papers' target layers are 4, 8 and 12 of 12."""

    teacher: str = ""
    shape: Literal["distilhubert", "thin", "edge"] = "distilhubert"
    objective: Literal["layers", "relations"] = "layers"
    layers: int = Field(default=2, gt=0)
    thin: ThinShape = ThinShape()
    edge: EdgeShape = EdgeShape()
    relations: StarRecipe = StarRecipe()
    # RobustDistiller's second head (`objectives/robust.py`), beside `corruption` of what the student hears.
    enhancement: EnhancementRecipe | None = None
    targets: tuple[int, ...] = (4, 8, 12)
    # Of the schedule's rate, for the CNN that was copied from the teacher (s3prl: 0.1).
    cnn_rate: float = Field(default=0.1, ge=0, le=1)
    # Up to so much of the teacher's target layers is kept on disk, in the cache folder; 0 keeps nothing.
    feature_cache_gb: float = Field(default=0.0, ge=0)
    schedule: Schedule

    @model_validator(mode="after")
    def _has_no_trunk(self) -> DistilRecipe:
        if self.edge.trunk is not None:
            raise ValueError(
                "edge.trunk is Whisper's own encoder, which begins with its weights and needs no distillation"
            )
        return self


# What a finished student leaves, and of a model the file that is written last.
EDGE, PREPROCESSOR = "edge.pt", "preprocessor_config.json"


def distil(
    recipe: DistilRecipe, folder: Path, cache_folder: Path, *, teacher: str | None = None, stop_after: int | None = None
) -> Path:
    """Distil into `folder`; returns it. A finished edge lies in `folder/edge.pt`, any other student in
    `folder/model` in the transformers format. Raises TrainingError."""
    source = teacher or recipe.teacher
    if not source:
        raise TeacherError("no teacher: give --teacher, a hub name or a folder, or name one in the recipe")
    loaded = load_teacher(source)
    batches, watched, digests = recipe.sources(cache_folder)
    torch.manual_seed(recipe.seed)
    judge = None
    if recipe.feature_cache_gb:
        if recipe.objective == "relations" and recipe.relations.attention:
            raise TeacherError("attention maps are not kept on disk; set feature_cache_gb to 0")
        judge = CachedTeacher(
            loaded, _layers_heard(recipe, loaded), cache_folder / "features", int(recipe.feature_cache_gb * 1e9)
        )
    stage = build(recipe, loaded, judge)
    job = Job(
        stage=stage,
        source=batches,
        schedule=recipe.schedule,
        seed=recipe.seed,
        folder=folder,
        identity={"recipe": recipe.identity(), "data": digests, "teacher": source},
        same_recipe=recipe.says_the_same,
        watch=None if watched is None else lambda stage: _look(stage, watched),
        rates=(("student.model.feature_extractor.", recipe.cnn_rate),) if recipe.shape == "distilhubert" else (),
    )
    fit(job, stop_after=stop_after)
    # Once: others may be reading it.
    if is_finished(folder) and not any((folder / file).is_file() for file in (EDGE, f"model/{PREPROCESSOR}")):
        if isinstance(stage.student, Edge):
            torch.save(stage.student.state_dict(), folder / EDGE)
        else:
            save_teacher(stage.student, folder / "model")
    return folder


def build(recipe: DistilRecipe, teacher: Teacher, judge: Judge | None = None) -> Stage:
    """The student before its first step. Raises TeacherError where recipe and teacher do not fit."""
    judge = judge or at_once(teacher)
    if recipe.enhancement is not None and recipe.objective == "relations":
        raise TeacherError("an enhancement head goes with `objective: layers`")
    if recipe.shape == "edge":
        edge = Edge(2, recipe.edge)
        if recipe.objective == "relations":
            return EdgeStarDistillation(edge, teacher, recipe.relations, judge)
        return EdgeDistillation(edge, teacher, recipe.targets, judge, recipe.enhancement)
    if recipe.shape == "thin":
        student = thin_student(recipe.thin, teacher)
    else:
        student = student_of(teacher, layers=recipe.layers)
    if recipe.objective == "relations":
        return StarDistillation(student, teacher, recipe.relations, judge)
    return Distillation(student, teacher, recipe.targets, judge, recipe.enhancement)


def _layers_heard(recipe: DistilRecipe, teacher: Teacher) -> list[int]:
    """Those of the teacher that the objective reads."""
    if recipe.objective == "layers":
        return list(recipe.targets)
    if recipe.shape == "edge":
        return [one for layer, _ in recipe.relations.edge_layers for one in (layer - 1, layer)]
    return list(range(teacher.layers + 1))


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
