"""STaR: a student learns how the teacher's frames relate to one another (Jang, Kim, Kim 2024).

Three objectives, of which the paper keeps the last two with equal weight; F_l is the output of layer l as
[T, D], F_0 the encoder's input, A_l its attention:

    average attention map   sum over l  KL( mean over heads of A_l, teacher  ||  the same, student )
    layer-wise Gram         sum over l  |G_l,teacher - G_l,student|^2,   G_l = F_l F_l^T
    intra-layer Gram        sum over l  the same of                      F_(l-1) F_l^T

All are T x T, so the widths may differ and no parameter is added. Squared differences are averaged over the
pairs of frames of each clip, as the public re-implementation does (the paper sums), and the Kullback-Leibler
divergence over its frames. Everything is computed in 32 bits: an entry is a sum of hundreds of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn
from torch.nn import functional

from training.cuts import Waves
from training.errors import TeacherError
from training.objectives.distillation import EdgeView, Judge, check_layers
from training.students.edge import Edge
from training.teachers import SelfSupervised, Teacher

Scaling = Literal["none", "width", "cosine"]
Layer = tuple[Tensor, Tensor]


class StarRecipe(BaseModel):
    """Which objectives count. `scaling` is the paper's "none", or divides each Gram matrix by its own width, or
    makes its entries cosines, for students whose frames have other lengths than the teacher's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: bool = False
    layerwise: bool = True
    intra: bool = True
    scaling: Scaling = "none"
    # For the edge student: (teacher's layer, the student's block), from input to output.
    edge_layers: tuple[tuple[int, str], ...] = (
        (2, "early.1"),
        (4, "shared.2"),
        (8, "keyword.1"),
        (12, "keyword.3"),
    )

    @model_validator(mode="after")
    def _something_counts(self) -> StarRecipe:
        if not (self.attention or self.layerwise or self.intra):
            raise ValueError("none of attention, layerwise and intra is on")
        return self


def gram(first: Tensor, second: Tensor, scaling: Scaling = "none") -> Tensor:
    """Inner products of frames [B, T, D] and frames [B, T, D], -> [B, T, T]."""
    with torch.autocast(first.device.type, enabled=False):
        first, second = first.float(), second.float()
        if scaling == "cosine":
            first, second = functional.normalize(first, dim=2), functional.normalize(second, dim=2)
        product = first @ second.transpose(1, 2)
        return product / first.shape[2] if scaling == "width" else product


def gram_distance(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the pairs of frames within each clip, then over clips. [B, T, T], mask [B, T]."""
    pairs = mask[:, :, None] & mask[:, None, :]
    squares = (teacher - student).square().masked_fill(~pairs, 0.0)
    return (squares.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)).mean()


def attention_distance(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """KL divergence of the maps [B, H, T, T], averaged over each model's own heads; rows within the clips count."""
    wanted, found = (attention.float().mean(dim=1).clamp(min=1e-8) for attention in (teacher, student))
    keys = mask[:, None, :]
    rows = (wanted * (wanted.log() - found.log())).masked_fill(~keys, 0.0).sum(dim=2)
    return ((rows * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def relation_losses(
    teacher: Sequence[Layer], student: Sequence[Layer], mask: Tensor, recipe: StarRecipe
) -> dict[str, Tensor]:
    """The Gram terms of matching layers, each given as its input and its output [B, T, D]."""

    def term(pick: Callable[[Layer], tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack(
            [
                gram_distance(gram(*pick(one), recipe.scaling), gram(*pick(other), recipe.scaling), mask)
                for one, other in zip(teacher, student, strict=True)
            ]
        ).sum()

    terms: dict[str, Tensor] = {}
    if recipe.layerwise:
        terms["layerwise"] = term(lambda layer: (layer[1], layer[1]))
    if recipe.intra:
        terms["intra"] = term(lambda layer: layer)
    return terms


class StarDistillation(nn.Module):
    """A student as deep as its teacher and with the same frames. Nothing but the student has parameters."""

    def __init__(self, student: SelfSupervised, teacher: Teacher, recipe: StarRecipe, judge: Judge) -> None:
        super().__init__()
        if student.layers != teacher.layers:
            raise TeacherError(
                f"the student has {student.layers} layers and the teacher {teacher.layers}; STaR compares them in pairs"
            )
        self.student = student
        self.recipe = recipe
        self._judge = judge
        if recipe.attention:
            student.keep_attention()
            teacher.keep_attention()

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """The objectives and their sum."""
        wanted = self._judge(batch.as_recorded)
        found = self.student(batch.waveform, batch.lengths)
        teacher, student = (list(zip(states.hidden, states.hidden[1:], strict=False)) for states in (wanted, found))
        terms = relation_losses(teacher, student, found.mask, self.recipe)
        if self.recipe.attention:
            maps = zip(wanted.attention, found.attention, strict=True)
            terms["attention"] = torch.stack([attention_distance(*pair, found.mask) for pair in maps]).sum()
        return {**terms, "total": torch.stack(list(terms.values())).sum()}


class EdgeStarDistillation(nn.Module):
    """The Gram terms for the edge student, of the input and output of each of its blocks in `edge_layers`; blocks
    are read each 50 ms, and the teacher's frames interpolated there."""

    def __init__(self, student: Edge, teacher: Teacher, recipe: StarRecipe, judge: Judge) -> None:
        super().__init__()
        if recipe.attention:
            raise TeacherError("the edge student has no attention; leave that objective off")
        blocks = dict(student.named_modules())
        check_layers([layer - 1 for layer, _ in recipe.edge_layers], teacher)
        check_layers([layer for layer, _ in recipe.edge_layers], teacher)
        absent = [name for _, name in recipe.edge_layers if name not in blocks]
        if absent:
            raise TeacherError(f"the edge student has no block {', '.join(absent)}")
        self.student = student
        self.recipe = recipe
        self._judge = judge
        self._view = EdgeView(teacher)
        self._heard: dict[str, Layer] = {}
        for _, name in recipe.edge_layers:
            blocks[name].register_forward_hook(
                lambda _block, given, out, name=name: self._heard.update({name: (given[0], out)})
            )

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """The objectives and their sum."""
        wanted = self._judge(batch.as_recorded)
        out = self.student(batch.waveform, batch.lengths)
        found, at = [], []
        for layer, name in self.recipe.edge_layers:
            before, after = self._heard.pop(name)
            found.append((_at_frames(before, out.mask), _at_frames(after, out.mask)))
            at.append(
                (self._view.at(wanted.hidden[layer - 1], out.mask), self._view.at(wanted.hidden[layer], out.mask))
            )
        known = self._view.known(out.mask, batch.lengths)
        terms = relation_losses(at, found, known, self.recipe)
        return {**terms, "total": torch.stack(list(terms.values())).sum()}


def _at_frames(block: Tensor, mask: Tensor) -> Tensor:
    """What a block gives [B, C, 1, T] at the frames [B, S] of 50 ms: early blocks have one each 25 ms. -> [B, S, C]."""
    x = block[:, :, 0].transpose(1, 2)
    return x if x.shape[1] == mask.shape[1] else x[:, ::2][:, : mask.shape[1]]
