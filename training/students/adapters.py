"""Adapters beside the feed-forward layers of a trunk (OS-KDFT: Heo et al. 2023 and its code of 2024).

They act in the task's pass and in inference; in the distillation's pass they are off, so the trunk itself
goes on resembling its teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from training.bounds import NotNegativeSpan
from training.teachers import SelfSupervised


class AdapterRecipe(BaseModel):
    """The defaults are the second generation's (HuBERT, WavLM Base+); the first has `norm`, `scale: 0.1`,
    `residual` and no noise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(default=64, gt=0)
    scale: float = Field(default=1.0, gt=0)
    norm: bool = False
    # The first generation's code adds the adapter's input once more, beside what its paper draws.
    residual: bool = False
    # While training, Gaussian noise in the bottleneck, so many times the mean absolute activation.
    noise: NotNegativeSpan = (0.1, 0.5)


class Adapter(nn.Module):
    """Down, ReLU, up; begins as nothing. [B, T, D] -> the same."""

    def __init__(self, width: int, recipe: AdapterRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.norm = nn.LayerNorm(width) if recipe.norm else nn.Identity()
        self.down = nn.Linear(width, recipe.width)
        self.up = nn.Linear(recipe.width, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(self.norm(x))
        lowest, highest = self.recipe.noise
        if self.training and highest:
            share = torch.empty((), device=x.device).uniform_(lowest, highest)
            inner = inner + torch.randn_like(inner) * inner.detach().abs().mean() * share
        out: Tensor = self.recipe.scale * self.up(functional.relu(inner))
        return x + out if self.recipe.residual else out


class Adapters(nn.Module):
    """One for each layer of a trunk, whose own weights and their names stay as they are."""

    def __init__(self, trunk: SelfSupervised, recipe: AdapterRecipe) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapter(trunk.width, recipe) for _ in range(trunk.layers))
        self._on = True
        encoder: Any = trunk.model
        for adapter, layer in zip(self.layers, encoder.encoder.layers, strict=True):
            layer.feed_forward.register_forward_hook(
                lambda _module, given, out, adapter=adapter: out + adapter(given[0]) if self._on else out
            )

    @contextmanager
    def off(self) -> Iterator[None]:
        """The trunk as if there were none."""
        self._on = False
        try:
            yield
        finally:
            self._on = True
