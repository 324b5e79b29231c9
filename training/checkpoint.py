"""What a run of `sotto train` keeps between two steps: weights, their average, training heads, the optimiser."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def update_average(average: dict[str, torch.Tensor], student: nn.Module, decay: float, step: int) -> None:
    """Exponential average of weights and statistics; the first steps count less (Adam's correction)."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in student.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value.detach(), 1 - decay)
        else:
            average[name].copy_(value)


def save(
    folder: Path,
    step: int,
    student: nn.Module,
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
) -> None:
    """Replace the run's checkpoint, whole or not at all."""
    partial = folder / "last.partial"
    state = {
        "step": step,
        "student": student.state_dict(),
        "heads": heads.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    torch.save(state, partial)
    partial.replace(folder / "last.pt")


def restore(
    folder: Path,
    student: nn.Module,
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
) -> int:
    """Take up the checkpoint, if there is one; the steps that were done."""
    path = folder / "last.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    student.load_state_dict(state["student"])
    heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return int(state["step"])
