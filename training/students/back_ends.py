"""What turns a trunk's frames into a speaker embedding.

`linear` is Kerpicci et al. 2023 with mean and deviation as its pooling, `light` the second generation of
OS-KDFT, `ecapa` its first (Desplanques et al. 2020). Frames past a clip's end change none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

BackEnd = Literal["linear", "light", "ecapa"]


class LinearBackEnd(nn.Linear):
    """Mean and deviation of the last layer, one linear layer."""

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__(2 * width, dim)
        self.dropout = dropout

    def forward(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:  # type: ignore[override]  # frames, not a matrix
        """Layers [B, T, D] and mask [B, T] -> [B, dim]."""
        pooled = statistics(hidden[-1], mask)
        return super().forward(functional.dropout(pooled, self.dropout, self.training))


class LightBackEnd(nn.Module):
    """A learned weighted sum of all layers, mean and deviation, a linear layer, batch norm."""

    def __init__(self, width: int, layers: int, dim: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(layers + 1))
        self.project = nn.Linear(2 * width, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Layers [B, T, D] and mask [B, T] -> [B, dim]."""
        shares = torch.softmax(self.share, dim=0)
        mixed = torch.stack([share * layer.float() for share, layer in zip(shares, hidden, strict=True)]).sum(dim=0)
        out: Tensor = self.norm(self.project(statistics(mixed, mask)))
        return out


class EcapaBackEnd(nn.Module):
    """ECAPA-TDNN on the last layer: kernel 5, three SE-Res2 blocks of dilation 2, 3 and 4 with summed inputs,
    aggregation, attentive statistics with global context, batch norm, linear, batch norm."""

    def __init__(self, width: int, dim: int, *, channels: int = 512, aggregated: int = 1536) -> None:
        super().__init__()
        self.begin = Tdnn(width, channels, 5)
        self.blocks = nn.ModuleList(SeRes2(channels, dilation) for dilation in (2, 3, 4))
        self.aggregate = nn.Conv1d(3 * channels, aggregated, 1)
        self.attention = nn.Sequential(
            nn.Conv1d(3 * aggregated, 128, 1), nn.ReLU(), nn.BatchNorm1d(128), nn.Tanh(), nn.Conv1d(128, aggregated, 1)
        )
        self.norm = nn.BatchNorm1d(2 * aggregated)
        self.project = nn.Linear(2 * aggregated, dim)
        self.out_norm = nn.BatchNorm1d(dim)

    def forward(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Layers [B, T, D] and mask [B, T] -> [B, dim]."""
        inside = mask[:, None, :].float()
        x = hidden[-1].float().transpose(1, 2)
        # Each channel with mean 0 and deviation 1 over its clip.
        mean, spread = moments(x, inside)
        x = self.begin((x - mean) / spread * inside, inside)
        given, outs = x, []
        for block in self.blocks:
            outs.append(block(given, inside))
            given = given + outs[-1]
        x = functional.relu(self.aggregate(torch.cat(outs, dim=1))) * inside
        mean, spread = moments(x, inside)
        context = torch.cat([x, mean.expand_as(x), spread.expand_as(x)], dim=1)
        weight = torch.softmax(self.attention(context).masked_fill(inside == 0, -1e4), dim=2)
        centre = (x * weight).sum(dim=2)
        deviation = ((x * x * weight).sum(dim=2) - centre.square()).clamp(min=1e-5).sqrt()
        out: Tensor = self.out_norm(self.project(self.norm(torch.cat([centre, deviation], dim=1))))
        return out


class Tdnn(nn.Module):
    """Convolution over time, ReLU, batch norm. [B, C, T] -> [B, C', T]."""

    def __init__(self, width_in: int, width_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, width_out, kernel, dilation=dilation, padding=dilation * (kernel // 2))
        self.norm = nn.BatchNorm1d(width_out)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        out: Tensor = self.norm(functional.relu(self.conv(x)))
        return out * inside


class SeRes2(nn.Module):
    """Res2 convolutions at eight scales between two pointwise layers, squeeze-excitation, residual."""

    SCALE, BOTTLENECK = 8, 128

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        part = channels // self.SCALE
        self.before = Tdnn(channels, channels, 1)
        self.parts = nn.ModuleList(Tdnn(part, part, 3, dilation) for _ in range(self.SCALE - 1))
        self.after = Tdnn(channels, channels, 1)
        self.squeeze = nn.Conv1d(channels, self.BOTTLENECK, 1)
        self.excite = nn.Conv1d(self.BOTTLENECK, channels, 1)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        first, *rest = self.before(x, inside).chunk(self.SCALE, dim=1)
        outs = [first]
        for number, (part, given) in enumerate(zip(self.parts, rest, strict=True)):
            outs.append(part(given if number == 0 else given + outs[-1], inside))
        y = self.after(torch.cat(outs, dim=1), inside)
        mean = y.sum(dim=2, keepdim=True) / inside.sum(dim=2, keepdim=True)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(mean))))
        out: Tensor = x + y * gate
        return out


def back_end(kind: BackEnd, width: int, layers: int, dim: int, dropout: float) -> nn.Module:
    """For a trunk of that width and depth."""
    if kind == "linear":
        return LinearBackEnd(width, dim, dropout)
    if kind == "light":
        return LightBackEnd(width, layers, dim)
    channels = ecapa_channels(width)
    return EcapaBackEnd(width, dim, channels=channels, aggregated=3 * channels)


def ecapa_channels(width: int) -> int:
    """512, as published, behind a trunk of 768 and wider; behind a narrower one as many less as it is narrower."""
    return min(512, max(64, 64 * round(512 / 768 * width / 64)))


def statistics(frames: Tensor, mask: Tensor) -> Tensor:
    """Mean and deviation over a clip's frames, [B, T, D] -> [B, 2D]."""
    mean, spread = moments(frames.float().transpose(1, 2), mask[:, None, :].float())
    return torch.cat([mean, spread], dim=1)[:, :, 0]


def moments(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the frames inside, [B, C, T] -> twice [B, C, 1]."""
    count = inside.sum(dim=2, keepdim=True)
    x = x * inside
    mean = x.sum(dim=2, keepdim=True) / count
    spread = (x.square().sum(dim=2, keepdim=True) / count - mean.square()).clamp(min=1e-5).sqrt()
    return mean, spread
