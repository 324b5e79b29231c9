"""How fast a run of `sotto train` learns: the optimiser's groups and its rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.muon import MuonAndAdamW, matrices_of
from training.recipe import Recipe
from training.students.edge import Edge


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    schedule = recipe.schedule
    if step < schedule.warmup_steps:
        return schedule.peak_learning_rate * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    span = schedule.peak_learning_rate - schedule.final_learning_rate
    return schedule.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_of(recipe: Recipe, student: Edge, heads: nn.Module) -> torch.optim.AdamW:
    """Each group's `rate` is its part of the learning rate. Decay acts on matrices and kernels only: shrinking a norm's
    scale or a bias means nothing."""
    trunk = [] if student.shape.trunk is None else list(student.trunk.parameters())
    slow = {id(parameter) for parameter in trunk}
    matrices = list(matrices_of(student)) if recipe.schedule.optimizer == "muon" else []
    apart = slow | {id(parameter) for parameter in matrices}
    others = [parameter for parameter in (*student.parameters(), *heads.parameters()) if id(parameter) not in apart]
    groups = []
    for parameters, rate in ((others, 1.0), (trunk, recipe.trunk.rate)):
        for decayed in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decayed]
            if chosen:
                decay = recipe.schedule.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "rate": rate})
    if matrices:
        return MuonAndAdamW(groups, matrices, weight_decay=recipe.schedule.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.schedule.peak_learning_rate)
