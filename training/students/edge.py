"""`edge`: one compact convolutional network for keywords, speakers and embeddings.

    waveform ─ LogMel ─ Stem ─ shared blocks ─┬─ keyword blocks ─ per-frame logits
     10 ms           20 ms        40 ms       └─ speaker blocks ─ attentive statistics ─ embedding

Convolutions are written in two dimensions with height 1: ONNX Runtime's blocked kernels exist only
there, and halve the time of depthwise layers.

Nothing is normalised over time, and what lies past a clip's end is set to zero after every layer, just
as a convolution pads. So a clip gives the same outputs alone and padded within a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.students.frontend import HOP, LogMel

STEM_STRIDE = 2
FRAME_STRIDE = 4
FRAME_HOP = HOP * FRAME_STRIDE


@dataclass(frozen=True, slots=True)
class EdgeShape:
    """Widths (channels), depths (blocks) and kernel lengths (frames)."""

    mels: int = 64
    stem_channels: int = 24
    early_width: int = 128
    early_blocks: int = 2
    early_kernel: int = 5
    shared_width: int = 192
    shared_blocks: int = 3
    task_width: int = 256
    keyword_blocks: int = 4
    speaker_blocks: int = 4
    kernel: int = 9
    speaker_dim: int = 192
    dropout: float = 0.1


@dataclass(frozen=True, slots=True)
class EdgeOutputs:
    """B clips, T frames of 40 ms, K labels with background first."""

    keyword_logits: Tensor  # [B, T, K]
    speaker_embedding: Tensor  # [B, speaker_dim], unit length
    embedding: Tensor  # [B, 2 * task_width], unit length
    frames: Tensor  # [B, T, 2 * task_width]
    mask: Tensor  # [B, T] bool, True within the clip


class Block(nn.Module):
    """Depthwise convolution over time, two pointwise layers, residual. [B, C, 1, T] -> the same."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return functional.relu(x + self.layers(x)) * mask.to(x.dtype)


class Widen(nn.Module):
    """Pointwise change of width, or a strided one that also halves the frame rate."""

    def __init__(self, width_in: int, width_out: int, *, stride: int = 1) -> None:
        super().__init__()
        kernel = 3 if stride > 1 else 1
        self.layers = nn.Sequential(
            nn.Conv2d(width_in, width_out, (1, kernel), (1, stride), (0, kernel // 2), bias=False),
            nn.BatchNorm2d(width_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out * mask.to(out.dtype)


class Stem(nn.Module):
    """Two small convolutions over frequency and time, then one vector a frame.

    [B, mels, T] -> [B, width, 1, ceil(T / 2)]. Local filters in frequency make the first features
    indifferent to small shifts of formants, which is most of what separates two people's vowels.
    """

    def __init__(self, mels: int, channels: int, width: int) -> None:
        super().__init__()
        first = max(8, channels * 2 // 3)
        self.first = nn.Sequential(
            nn.Conv2d(1, first, 3, (2, STEM_STRIDE), 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(first, channels, 3, (2, 1), 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.flat = channels * (mels // 4)
        self.join = Widen(self.flat, width)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        x = self.first(features.unsqueeze(1))
        mask = mask.to(x.dtype)
        x = self.second(x * mask) * mask
        x = x.reshape(x.shape[0], self.flat, 1, -1)
        out: Tensor = self.join(x, mask)
        return out


class AttentiveStatistics(nn.Module):
    """Weighted mean and deviation over time (Okabe et al. 2018, eq. 1-5). [B, C, 1, T] -> [B, 2C]."""

    def __init__(self, width: int, bottleneck: int = 128) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Conv2d(width, bottleneck, 1), nn.Tanh(), nn.Conv2d(bottleneck, width, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.score(x).float().masked_fill(mask == 0, -1e4)
        weight = torch.softmax(score, dim=3)
        x = x.float()
        mean = (weight * x).sum(dim=(2, 3))
        spread = (weight * x * x).sum(dim=(2, 3)) - mean * mean
        return torch.cat([mean, torch.sqrt(spread.clamp(min=1e-4))], dim=1)


class Edge(nn.Module):
    """The student. `labels` counts background: K = 1 + number of keywords."""

    def __init__(self, labels: int, shape: EdgeShape | None = None) -> None:
        super().__init__()
        shape = shape or EdgeShape()
        self.shape = shape
        self.features = LogMel(shape.mels)
        self.stem = Stem(shape.mels, shape.stem_channels, shape.early_width)
        self.early = _blocks(shape.early_blocks, shape.early_width, shape.early_kernel)
        self.down = Widen(shape.early_width, shape.shared_width, stride=2)
        self.shared = _blocks(shape.shared_blocks, shape.shared_width, shape.kernel)
        self.to_keyword = Widen(shape.shared_width, shape.task_width)
        self.keyword = _blocks(shape.keyword_blocks, shape.task_width, shape.kernel)
        self.to_speaker = Widen(shape.shared_width, shape.task_width)
        self.speaker = _blocks(shape.speaker_blocks, shape.task_width, shape.kernel)
        self.dropout = nn.Dropout(shape.dropout)
        self.keyword_head = nn.Conv2d(shape.task_width, labels, 1)
        self.pool = AttentiveStatistics(shape.task_width)
        self.speaker_head = nn.Sequential(
            nn.BatchNorm1d(2 * shape.task_width),
            nn.Linear(2 * shape.task_width, shape.speaker_dim, bias=False),
            nn.BatchNorm1d(shape.speaker_dim),
        )

    def forward(self, waveform: Tensor, lengths: Tensor, mask_features: FeatureMask | None = None) -> EdgeOutputs:
        """Waveform [B, N] in [-1, 1], lengths [B] in samples; what lies past a length is ignored.

        `mask_features` is training's SpecAugment, applied to the log-mel features.
        """
        samples = torch.arange(waveform.shape[1], device=waveform.device)
        heard = waveform * (samples[None, :] < lengths[:, None]).to(waveform.dtype)
        with torch.autocast(waveform.device.type, enabled=False):
            features = self.features(heard.float())
        if mask_features is not None:
            features = mask_features(features)
        hops = _ceil_div(lengths, HOP)
        fine = _mask(hops, features.shape[2])
        features = features * fine[:, None, :]
        steps = _ceil_div(hops, STEM_STRIDE)
        stem_mask = _mask(steps, (features.shape[2] + 1) // STEM_STRIDE)[:, None, None, :]
        x = self.stem(features, stem_mask)
        for block in self.early:
            x = block(x, stem_mask)
        flat_mask = _mask(_ceil_div(steps, 2), (x.shape[3] + 1) // 2)
        mask = flat_mask[:, None, None, :]
        x = self.down(x, mask)
        for block in self.shared:
            x = block(x, mask)
        spoken = self.to_keyword(x, mask)
        for block in self.keyword:
            spoken = block(spoken, mask)
        voiced = self.to_speaker(x, mask)
        for block in self.speaker:
            voiced = block(voiced, mask)
        logits = self.keyword_head(self.dropout(spoken))[:, :, 0].transpose(1, 2)
        speaker = self.speaker_head(self.dropout(self.pool(voiced, mask)))
        frames = torch.cat([spoken, voiced], dim=1)[:, :, 0].transpose(1, 2)
        total = frames.float().sum(dim=1)
        return EdgeOutputs(
            keyword_logits=logits.float(),
            speaker_embedding=_unit(speaker.float()),
            embedding=_unit(total),
            frames=frames.float(),
            mask=flat_mask > 0,
        )


class FeatureMask:
    """SpecAugment (Park et al. 2019): stripes of mel channels and of time set to the fill value.

    Each clip's stripes are its own. `generator` makes step n repeatable.
    """

    def __init__(
        self,
        generator: torch.Generator,
        *,
        frequency_stripes: int = 2,
        widest_mels: int = 10,
        time_stripes: int = 2,
        longest_frames: int = 12,
    ) -> None:
        self._generator = generator
        self._plan = ((1, frequency_stripes, widest_mels), (2, time_stripes, longest_frames))

    def __call__(self, features: Tensor) -> Tensor:
        for axis, stripes, widest in self._plan:
            size = features.shape[axis]
            position = torch.arange(size)
            for _ in range(stripes):
                width = torch.rand(features.shape[0], 1, generator=self._generator) * widest
                start = torch.rand(features.shape[0], 1, generator=self._generator) * (size - width)
                hidden = (position >= start) & (position < start + width)
                shape = (features.shape[0], size, 1) if axis == 1 else (features.shape[0], 1, size)
                features = features.masked_fill(hidden.reshape(shape).to(features.device), 0.0)
        return features


def _blocks(count: int, width: int, kernel: int) -> nn.ModuleList:
    return nn.ModuleList(Block(width, kernel) for _ in range(count))


def _ceil_div(value: Tensor, divisor: int) -> Tensor:
    return torch.div(value + (divisor - 1), divisor, rounding_mode="floor")


def _mask(valid: Tensor, size: int) -> Tensor:
    """[B] counts -> [B, size] float, 1 where the position is below the count."""
    positions = torch.arange(size, device=valid.device)
    return (positions[None, :] < valid[:, None]).to(torch.float32)


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=1, keepdim=True) + 1e-12)
