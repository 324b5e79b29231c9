"""`edge`: one compact convolutional network for keywords, speakers and embeddings.

    waveform ─ LogMel ─ Stem ─ shared blocks ─┬─ keyword blocks ─ per-frame logits
  12.5 ms           25 ms        50 ms       └─ speaker blocks ─ attentive statistics ─ embedding

Convolutions are written in two dimensions with height 1: ONNX Runtime's blocked kernels exist only
there, and halve the time of depthwise layers.

With `speaker_dim: 0` the speaker branch is left out: keywords only. `speaker_from` says where it parts: what
the shared blocks keep, which learn words, is little of a voice.

With a `trunk` the keyword blocks follow Whisper's encoder (`whisper.py`) instead of all that lies before them here.

Nothing is normalised over time, and what lies past a clip's end is set to zero after every layer, just
as a convolution pads. So a clip gives the same outputs alone and padded within a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.bounds import Count, CountOrZero, Probability
from training.students.frontend import HOP, LogMel
from training.students.whisper import TrunkShape, WhisperTrunk

STEM_STRIDE = 2
FRAME_STRIDE = 4
FRAME_HOP = HOP * FRAME_STRIDE
# Whose frames training transforms at once: as many as a core's cache holds.
CLIPS_AT_A_TIME = 8

Parting = Literal["shared", "early", "features"]
PARTINGS: tuple[Parting, ...] = get_args(Parting)  # from late to early
# All of `Edge` that is the speaker branch's alone, where it parts at the features.
SPEAKER_PARTS = ("speaker_stem", "speaker_early", "to_speaker", "speaker", "pool", "speaker_head")
FeatureChange = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class EdgeShape:
    """Widths (channels), depths (blocks) and kernel lengths (frames)."""

    mels: Count = 64
    stem_channels: Count = 24
    early_width: Count = 128
    early_blocks: Count = 2
    early_kernel: Count = 5
    shared_width: Count = 192
    shared_blocks: Count = 3
    task_width: Count = 256
    keyword_blocks: Count = 4
    speaker_blocks: Count = 3
    kernel: Count = 9
    # How far a block's kernel reaches past its frame, of those of `kernel` frames; half of it by default. What a stream
    # has to wait for adds up over the blocks.
    ahead: int | None = None
    speaker_dim: CountOrZero = 192  # 0: no speaker branch
    # Where the speaker branch parts: after the shared blocks, after the early ones, or at once, with a stem and early
    # blocks of its own.
    speaker_from: Parting = "shared"
    # Of one that parts at the features, where it is narrower or shorter there than what hears words.
    speaker_stem_channels: Count | None = None
    speaker_early_blocks: CountOrZero | None = None
    dropout: Probability = 0.1
    # Whisper's encoder below the keyword blocks. The speaker branch keeps layers of its own: it parts at the features.
    trunk: TrunkShape | None = None

    def __post_init__(self) -> None:
        if self.trunk is not None and self.tells_speakers and self.speaker_from != "features":
            raise ValueError("beside a trunk the speaker branch has to part at the features (speaker_from)")
        own = (self.speaker_stem_channels, self.speaker_early_blocks)
        if own != (None, None) and not (self.tells_speakers and self.speaker_from == "features"):
            raise ValueError(
                "speaker_stem_channels and speaker_early_blocks are of a speaker branch that parts at the features"
            )
        if self.ahead is not None and not 0 <= self.ahead < self.kernel:
            raise ValueError(f"ahead is {self.ahead}; it must be at least 0 and less than the kernel's {self.kernel}")

    @property
    def tells_speakers(self) -> bool:
        return self.speaker_dim > 0

    @property
    def embedding_dim(self) -> int:
        """Of both branches' frames, side by side."""
        return self.task_width * (2 if self.tells_speakers else 1)


@dataclass(frozen=True, slots=True)
class EdgeOutputs:
    """B clips, T frames of 50 ms, K labels with background first."""

    keyword_logits: Tensor  # [B, T, K]
    speaker_embedding: Tensor  # [B, speaker_dim], unit length; of speaker_dim 0, none
    embedding: Tensor  # [B, embedding_dim], unit length
    frames: Tensor  # [B, T, embedding_dim]
    mask: Tensor  # [B, T] bool, True within the clip


class Depthwise(nn.Conv2d):
    """A convolution of each channel by itself, whose gradients CPUs compute two to three times as fast in float32 as in
    bfloat16 (torch 2.13, AVX-512)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class Block(nn.Module):
    """Depthwise convolution over time, two pointwise layers, residual. [B, C, 1, T] -> the same."""

    def __init__(self, width: int, kernel: int, ahead: int | None = None) -> None:
        super().__init__()
        self.ahead = kernel // 2 if ahead is None else ahead
        self.behind = kernel - 1 - self.ahead
        # The same on both sides where that is so: the graph of it has no operator more.
        even = self.ahead == self.behind
        self.pad = nn.Identity() if even else nn.ZeroPad2d((self.behind, self.ahead, 0, 0))
        padding = (0, self.ahead if even else 0)
        self.layers = nn.Sequential(
            Depthwise(width, width, (1, kernel), padding=padding, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return functional.relu(x + self.layers(self.pad(x))) * mask.to(x.dtype)


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
        return self.flatten(self.second(x * mask) * mask, mask)

    def flatten(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, channels, mels / 4, T] -> [B, width, 1, T]."""
        out: Tensor = self.join(x.reshape(x.shape[0], self.flat, 1, -1), mask)
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
        if shape.trunk is not None:
            self.trunk = WhisperTrunk(shape.trunk)
            self.to_keyword = Widen(shape.trunk.width, shape.task_width)
        else:
            self.stem = Stem(shape.mels, shape.stem_channels, shape.early_width)
            self.early = _blocks(shape.early_blocks, shape.early_width, shape.early_kernel)
            self.down = Widen(shape.early_width, shape.shared_width, stride=2)
            self.shared = _blocks(shape.shared_blocks, shape.shared_width, shape.kernel, shape.ahead)
            self.to_keyword = Widen(shape.shared_width, shape.task_width)
        self.keyword = _blocks(shape.keyword_blocks, shape.task_width, shape.kernel, shape.ahead)
        # In this order, which decides what a seed begins with.
        if shape.tells_speakers:
            if shape.speaker_from == "features":
                channels, early = shape.speaker_stem_channels, shape.speaker_early_blocks
                self.speaker_stem = Stem(shape.mels, channels or shape.stem_channels, shape.early_width)
                self.speaker_early = _blocks(
                    shape.early_blocks if early is None else early, shape.early_width, shape.early_kernel
                )
            if shape.speaker_from == "shared":
                self.to_speaker = Widen(shape.shared_width, shape.task_width)
            else:
                self.to_speaker = Widen(shape.early_width, shape.task_width, stride=2)
            self.speaker = _blocks(shape.speaker_blocks, shape.task_width, shape.kernel)
        self.dropout = nn.Dropout(shape.dropout)
        self.keyword_head = nn.Conv2d(shape.task_width, labels, 1)
        if not shape.tells_speakers:
            return
        self.pool = AttentiveStatistics(shape.task_width)
        self.speaker_head = nn.Sequential(
            nn.BatchNorm1d(2 * shape.task_width),
            nn.Linear(2 * shape.task_width, shape.speaker_dim, bias=False),
            nn.BatchNorm1d(shape.speaker_dim),
        )

    def hold_keywords(self) -> None:
        """Take all but the speaker branch out of training, statistics of its norms included."""
        # Dropout is both branches'.
        self._hold(name for name, _ in self.named_children() if name not in {*SPEAKER_PARTS, "dropout"})

    def hold_speakers(self) -> None:
        """Take a speaker branch that parts at the features out of training, statistics of its norms included: it stays
        what it is."""
        self._hold(SPEAKER_PARTS)

    def _hold(self, parts: Iterable[str]) -> None:
        for name in parts:
            self.get_submodule(name).eval().requires_grad_(False)

    def _features(self, waveform: Tensor) -> Tensor:
        """Of all clips; where it trains, of a few at a time. The graph has no such parts."""
        if self.training:
            return torch.cat([self.features(part) for part in torch.split(waveform, CLIPS_AT_A_TIME)])
        features: Tensor = self.features(waveform)
        return features

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor,
        augment: FeatureChange | None = None,
        *,
        shared_gradient: float = 1.0,
        speakers: bool = True,
        keywords: bool = True,
    ) -> EdgeOutputs:
        """Waveform [B, N] in [-1, 1], lengths [B] in samples; what lies past a length is ignored.

        `augment` is training's change of the log-mel features [B, mels, frames]. `shared_gradient` is how
        much of the speaker branch's gradient reaches the layers that it shares; values are the same for any.
        Without `speakers` the outputs are those of a student that has no such branch, which is not computed. Without
        `keywords` only a speaker branch that parts at the features is: there are no logits, and frames are its own.
        """
        if not keywords and not (speakers and self.shape.tells_speakers and self.shape.speaker_from == "features"):
            raise ValueError("only a speaker branch that parts at the features can be computed without keywords")
        samples = torch.arange(waveform.shape[1], device=waveform.device)
        heard = (samples[None, :] < lengths[:, None]).to(waveform.dtype)
        # A frame is within the clip where its centre is, so coarser masks are every other element.
        fine_mask = heard[:, ::HOP]
        stem_mask = fine_mask[:, ::STEM_STRIDE]
        flat_mask = heard[:, ::FRAME_HOP]
        early_mask = stem_mask[:, None, None, :]
        mask = flat_mask[:, None, None, :]
        speakers = self.shape.tells_speakers and speakers
        if self.shape.trunk is None or speakers:
            with torch.autocast(waveform.device.type, enabled=False):
                features = self._features((waveform * heard).float())
            if augment is not None:
                features = augment(features)
            features = features * fine_mask[:, None, :]
        logits = waveform.new_zeros(waveform.shape[0], flat_mask.shape[1], 0)
        branches = []
        if keywords:
            if self.shape.trunk is not None:
                x = self.trunk(waveform * heard, lengths, augment)
            else:
                x = self.stem(features, early_mask)
                for block in self.early:
                    x = block(x, early_mask)
                early = x
                x = self.down(x, mask)
                for block in self.shared:
                    x = block(x, mask)
            spoken = self.to_keyword(x, mask)
            for block in self.keyword:
                spoken = block(spoken, mask)
            logits = self.keyword_head(self.dropout(spoken))[:, :, 0].transpose(1, 2)
            branches.append(spoken)
        if speakers:
            if self.shape.speaker_from == "features":
                own = self.speaker_stem(features, early_mask)
                for block in self.speaker_early:
                    own = block(own, early_mask)
            else:
                own = x if self.shape.speaker_from == "shared" else early
                if shared_gradient != 1.0:
                    own = own * shared_gradient + own.detach() * (1.0 - shared_gradient)
            voiced = self.to_speaker(own, mask)
            for block in self.speaker:
                voiced = block(voiced, mask)
            speaker = unit(self.speaker_head(self.dropout(self.pool(voiced, mask))).float())
            branches.append(voiced)
        else:
            speaker = logits.new_zeros(len(logits), 0, dtype=torch.float32)
        together = torch.cat(branches, dim=1) if len(branches) > 1 else branches[0]
        frames = together[:, :, 0].transpose(1, 2)
        total = frames.float().sum(dim=1)
        return EdgeOutputs(
            keyword_logits=logits.float(),
            speaker_embedding=speaker,
            embedding=unit(total),
            frames=frames.float(),
            mask=flat_mask > 0,
        )


def is_convolutional(network: nn.Module) -> TypeGuard[Edge]:
    """Whether it is an `Edge` without a trunk, which alone streams and keeps ONNX Runtime's blocked layout."""
    return isinstance(network, Edge) and network.shape.trunk is None


def _blocks(count: int, width: int, kernel: int, ahead: int | None = None) -> nn.ModuleList:
    return nn.ModuleList(Block(width, kernel, ahead) for _ in range(count))


def unit(x: Tensor) -> Tensor:
    """Rows [B, D] at length 1."""
    return x / torch.sqrt((x * x).sum(dim=1, keepdim=True) + 1e-12)
