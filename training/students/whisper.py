"""Whisper's encoder (Radford et al. 2023, "Robust speech recognition via large-scale weak supervision") as a trunk.

    waveform ─ log-mel ─ two convolutions ─ + positions ─ transformer layers ─ norm ─ means
                10 ms            20 ms                                                50 ms

The published network hears 30 seconds at once. This one hears clips of any length, alone or padded within a batch: past
a clip's end nothing is attended to, and a frame attends to its block of 1.28 s and the blocks on either side, so the
cost of a second does not grow with the clip. Up to two blocks that is all of the clip, as published. Its features lie
within 80 dB of the loudest in the clip (of its own samples only, so no neighbour matters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from training.audio_cache import SAMPLE_RATE_HZ
from training.bounds import Count
from training.students.frontend import CENTRE, SPREAD
from training.students.frontend import FLOOR as LOG_MEL_FLOOR

MELS, WINDOW, MEL_HOP = 80, 400, 160
HOP = 2 * MEL_HOP  # samples from one frame of the encoder to the next
STRIDE = 800  # samples from one of the trunk's frames to the next
# Silence before and after: the published network never met speech without. As long as two of the trunk's frames.
MARGIN = 2 * STRIDE
BLOCK = 64  # frames of the encoder
# The encoder's positions end there, after 30 s; the trunk's begin anew.
POSITIONS = 1500
FLOOR = 1e-10
DECADES = 8.0
# A frame of the encoder every 20 ms and one of the trunk every 50 ms meet every 100 ms.
GROUP = 5
# Which of the frames from 20 ms before a meeting on make up its two: those within 25 ms of 0 ms, and of 50 ms.
NEAR = ((1 / 3, 1 / 3, 1 / 3, 0.0, 0.0), (0.0, 0.0, 0.0, 0.5, 0.5))
HIDDEN = -1e4


@dataclass(frozen=True, slots=True)
class TrunkShape:
    """Of the base size by default."""

    width: Count = 512
    layers: Count = 6
    heads: Count = 8
    hidden: Count = 2048

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width}, which {self.heads} heads do not divide into even parts")


class Features(nn.Module):
    """[B, N] in [-1, 1], N a multiple of MEL_HOP, zero where nothing is to be heard -> [B, 80, N / MEL_HOP]."""

    def __init__(self) -> None:
        super().__init__()
        bins = 1 + WINDOW // 2
        mel = mel_filter_bank(bins, MELS, 0.0, SAMPLE_RATE_HZ / 2, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney")
        n = torch.arange(WINDOW, dtype=torch.float64)
        phase = 2 * math.pi / WINDOW * torch.outer(n, torch.arange(bins, dtype=torch.float64))
        window = torch.hann_window(WINDOW, dtype=torch.float64)[:, None]
        self.transform: Tensor
        self.mel: Tensor
        both = torch.cat([torch.cos(phase) * window, torch.sin(phase) * window], dim=1)
        self.register_buffer("transform", both.float(), persistent=False)
        self.register_buffer("mel", torch.from_numpy(mel).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        half = MEL_HOP // 2  # a window is five of these, and the next one begins two later
        parts = functional.pad(waveform, (WINDOW // 2, WINDOW // 2)).reshape(waveform.shape[0], -1, half)
        count = waveform.shape[1] // MEL_HOP
        windows = torch.cat([parts[:, first : first + 2 * count : 2] for first in range(WINDOW // half)], dim=2)
        real, imaginary = torch.matmul(windows, self.transform).chunk(2, dim=2)
        power = torch.matmul(real * real + imaginary * imaginary, self.mel).clamp(min=FLOOR).log10()
        power = torch.maximum(power, power.amax(dim=(1, 2), keepdim=True) - DECADES)
        return ((power + 4.0) / 4.0).transpose(1, 2)


def augmented(features: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` is made for the features of `LogMel`, natural logarithms on another scale, which it keeps above a floor
    that is higher than this one: they are lifted to it meanwhile, so that nothing quiet is lost."""
    lift = math.log(LOG_MEL_FLOOR / FLOOR)
    natural = (features * 4.0 - 4.0) * math.log(10.0) + lift
    changed = change((natural - CENTRE) / SPREAD) * SPREAD + CENTRE - lift
    return (changed / math.log(10.0) + 4.0) / 4.0


class Layer(nn.Module):
    """Self-attention and two linear layers, each behind a norm. [B, T, D] -> the same."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, shape.hidden), nn.Linear(shape.hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` [B, T]: True where a frame can be attended to."""
        x = x + self.merge(self._attend(self.project(self.attention_norm(x)), mask))
        out: Tensor = x + self.narrow(functional.gelu(self.widen(self.norm(x))))
        return out

    def _attend(self, both: Tensor, mask: Tensor) -> Tensor:
        clips, frames, width = both.shape[0], both.shape[1], both.shape[2] // 3
        if frames <= 2 * BLOCK and not torch.onnx.is_in_onnx_export():
            # What follows, where each of two blocks is beside the other.
            query, key, value = both.reshape(clips, frames, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            heard = functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
            return heard.transpose(1, 2).reshape(clips, frames, width)
        more = (frames + BLOCK - 1) // BLOCK * BLOCK - frames
        both = functional.pad(both, (0, 0, BLOCK, BLOCK + more))
        around = _with_neighbours(both[:, :, width:].reshape(clips, -1, BLOCK, 2 * width))
        query, (key, value) = both[:, BLOCK:-BLOCK, :width], around.chunk(2, dim=3)
        scores = torch.matmul(self._by_head(query, BLOCK), self._by_head(key, 3 * BLOCK).transpose(3, 4))
        seen = _with_neighbours(functional.pad(mask.to(both.dtype), (BLOCK, BLOCK + more)).reshape(clips, -1, BLOCK, 1))
        scores = scores / math.sqrt(width // self.heads) + ((1.0 - seen) * HIDDEN).transpose(2, 3)[:, :, None]
        heard = torch.matmul(torch.softmax(scores, dim=4), self._by_head(value, 3 * BLOCK))
        return heard.transpose(2, 3).reshape(clips, -1, width)[:, :frames]

    def _by_head(self, x: Tensor, frames: int) -> Tensor:
        """[B, ..., D] -> [B, blocks, heads, frames, D / heads]."""
        return x.reshape(x.shape[0], -1, frames, self.heads, x.shape[-1] // self.heads).transpose(2, 3)


def _with_neighbours(blocks: Tensor) -> Tensor:
    """[B, n + 2, L, C] -> [B, n, 3L, C]: each block between the one before and the one after."""
    return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2)


class WhisperTrunk(nn.Module):
    """Waveform [B, N] in [-1, 1], zero past lengths [B] -> [B, width, 1, ceil(N / STRIDE)]; vector k is centred on
    sample k * STRIDE. In training, positions begin anywhere: a word is the same wherever it lies."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        self.shape = shape
        self.features = Features()
        self.first = nn.Conv1d(MELS, shape.width, 3, padding=1)
        self.second = nn.Conv1d(shape.width, shape.width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        rates = torch.exp(-math.log(10_000.0) / (shape.width // 2 - 1) * torch.arange(shape.width // 2))
        self.rates: Tensor
        self.near: Tensor
        self.register_buffer("rates", rates, persistent=False)
        self.register_buffer("near", torch.tensor(NEAR), persistent=False)

    def hold(self, learning: int) -> None:
        """Take all but the last `learning` layers, and the norm after them, out of training."""
        held = [self.first, self.second, *list(self.layers)[: len(self.layers) - learning]]
        for part in held if learning else [self]:
            part.requires_grad_(False)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Those of the published encoder, by CTranslate2's names (`training/whisper.py`). Raises KeyError, RuntimeError
        where they are of another shape."""
        names = {"first": "conv1", "second": "conv2", "norm": "layer_norm"}
        for index in range(len(self.layers)):
            own, theirs = f"layers.{index}", f"layer_{index}"
            names |= {
                f"{own}.attention_norm": f"{theirs}/self_attention/layer_norm",
                f"{own}.project": f"{theirs}/self_attention/linear_0",
                f"{own}.merge": f"{theirs}/self_attention/linear_1",
                f"{own}.norm": f"{theirs}/ffn/layer_norm",
                f"{own}.widen": f"{theirs}/ffn/linear_0",
                f"{own}.narrow": f"{theirs}/ffn/linear_1",
            }
        given: dict[str, Tensor] = {}
        for own, theirs in names.items():
            parts = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
            given |= {
                f"{own}.{part}": weights[f"{theirs}/{name}"]
                for part, name in zip(("weight", "bias"), parts, strict=True)
            }
        self.load_state_dict(given)

    def forward(self, waveform: Tensor, lengths: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        # Without negative numbers, whose quotients ONNX rounds up.
        frames = (waveform.shape[1] + STRIDE - 1) // STRIDE
        pairs = (frames + 1) // 2
        padded = functional.pad(waveform, (MARGIN, MARGIN + pairs * 2 * STRIDE - waveform.shape[1]))
        mask = (
            torch.arange(padded.shape[1] // MEL_HOP, device=waveform.device) * MEL_HOP < lengths[:, None] + 2 * MARGIN
        )
        with torch.autocast(waveform.device.type, enabled=False):
            features = self.features(padded.float())
        if augment is not None:
            features = augmented(features, augment)
        coarse = mask[:, ::2]
        x = self.encode(features, mask) * coarse[:, :, None]
        # From 20 ms before the clip on.
        first = MARGIN // HOP - 1
        groups = x[:, first : first + pairs * GROUP].reshape(x.shape[0], -1, GROUP, self.shape.width)
        near = torch.matmul(self.near.to(x.dtype), groups)
        return near.reshape(x.shape[0], -1, self.shape.width)[:, :frames].transpose(1, 2)[:, :, None]

    def encode(self, features: Tensor, mask: Tensor) -> Tensor:
        """[B, 80, T] -> [B, T / 2, width]; `mask` [B, T] is True within the clip."""
        fine = mask[:, None].to(features.dtype)
        x = functional.gelu(self.first(features * fine)) * fine
        x = functional.gelu(self.second(x)).transpose(1, 2)
        place = torch.arange(x.shape[1], device=x.device)
        if self.training:
            place = place + torch.randint(POSITIONS - x.shape[1], ()) if x.shape[1] < POSITIONS else place
        angle = (place % POSITIONS)[:, None] * self.rates
        x = x + torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
        coarse = mask[:, ::2]
        for layer in self.layers:
            x = layer(x, coarse)
        out: Tensor = self.norm(x)
        return out
