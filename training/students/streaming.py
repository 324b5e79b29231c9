"""`Edge`'s keyword branch over audio that is still coming: the same weights and logits, a chunk at a time.

Every layer is a convolution over a few frames, so what it needs of the past is kept and handed to the next call, and
what it needs of the future is waited for: a layer that reaches `ahead` frames past its own gives its output `ahead`
frames late. `delay` is what that adds up to. What the clip graph pads with zeros, before the beginning and past the
end, is zero here as well, layer by layer; so the logits are those of the clip graph over the whole of the audio.

A chunk is a frame or two for each of many streams. Convolutions of that shape are slow, one stream after the other, so
channels come last here and what is pointwise is one matrix product over all frames of all streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.students.edge import FRAME_HOP, STEM_STRIDE, Block, Edge
from training.students.frontend import HOP

STEM_HOP = HOP * STEM_STRIDE
STEM_RATE = FRAME_HOP // STEM_HOP


class _Taps(nn.Module):
    """A depthwise convolution over time and what follows it in a block. [B, behind + T + ahead, C] -> [B, T, C]."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.ahead, self.behind = block.ahead, block.behind
        layers = block.layers
        taps, bias = _folded(layers[0], layers[1])
        self.taps, self.bias = nn.Parameter(taps), nn.Parameter(bias)
        self.first = _Product(layers[2], layers[3])
        self.second = _Product(layers[5], layers[6])

    def forward(self, joined: Tensor, mask: Tensor) -> Tensor:
        channels = joined.transpose(1, 2)[:, :, None]
        x = functional.conv2d(channels, self.taps, self.bias, groups=len(self.taps)).squeeze(2).transpose(1, 2)
        x = self.second(functional.relu(self.first(x)))
        return functional.relu(_between(joined, self.behind, -self.ahead) + x) * mask


class _Product(nn.Module):
    """A convolution that sees `taps` frames as a product of what they hold. [B, T, taps * C] -> [B, T, C']."""

    def __init__(self, convolution: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        weight, bias = _folded(convolution, norm)
        self.weight = nn.Parameter(weight[:, :, 0].permute(2, 1, 0).flatten(0, 1).contiguous())
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


@dataclass(frozen=True, slots=True)
class _Past:
    """What one layer keeps: the last `frames` of `width` values."""

    frames: int
    width: int

    @property
    def size(self) -> int:
        return self.frames * self.width


class StreamingEdge(nn.Module):
    """B streams, each n frames of 50 ms further on.

    `forward` takes samples [B, n * FRAME_HOP], how many frames each stream had before (position [B], int64), its
    samples in all (length [B], int64; anything past the end while it goes on) and the state of the call before
    [B, state_size] (zeros at first). It gives the logits [B, n, K] of the frames from `position - delay` on (those
    before 0 mean nothing) and the new state. Once a stream has ended, `delay` frames of silence bring out the rest.
    """

    def __init__(self, student: Edge) -> None:
        super().__init__()
        shape = student.shape
        self.features = student.features
        # The two convolutions over frequency as well: padded there, and over time by what came before.
        self.first, self.second = (_over_time(layers) for layers in (student.stem.first, student.stem.second))
        self.flatten = _Product(student.stem.join.layers[0], student.stem.join.layers[1])
        early, shared, keyword = (_taps(blocks) for blocks in (student.early, student.shared, student.keyword))
        self.early, self.shared, self.keyword = (nn.ModuleList(taps) for taps in (early, shared, keyword))
        self.down = _Product(student.down.layers[0], student.down.layers[1])
        self.to_keyword = _Product(student.to_keyword.layers[0], student.to_keyword.layers[1])
        self.head = _Product(student.keyword_head)
        self._bands = shape.mels // 2
        self._channels = self.first.out_channels
        # At 25 ms: one frame late for the features, one for the second convolution, and what the blocks reach ahead.
        offset = -2 - sum(block.ahead for block in early)
        # A stride of two takes every other frame: which ones come in pairs depends on where a chunk begins.
        self._odd = offset % 2
        self._late = -offset
        self._delays = [-(offset // 2)]
        for block in [*shared, *keyword]:
            self._delays.append(self._delays[-1] + block.ahead)
        self.delay = self._delays[-1]
        # In the order in which `forward` meets them.
        self._pasts = [
            _Past(2 * HOP, 1),
            _Past(2, shape.mels),
            _Past(2, self._channels * self._bands),
            *(_Past(block.ahead + block.behind, shape.early_width) for block in early),
            _Past(1 + self._odd, shape.early_width),
            *(_Past(block.ahead + block.behind, shape.shared_width) for block in shared),
            *(_Past(block.ahead + block.behind, shape.task_width) for block in keyword),
        ]
        self.state_size = sum(past.size for past in self._pasts)

    def forward(self, samples: Tensor, position: Tensor, length: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        memory = _Memory(state, self._pasts)
        position, length = position[:, None], length[:, None]
        count = samples.shape[1]
        sample = position * FRAME_HOP + torch.arange(count, device=samples.device)
        heard = memory.join((samples * (sample < length))[:, :, None]).squeeze(2)
        # The frames whose second half is here: one of 12.5 ms late.
        rate = FRAME_HOP // HOP
        features = self.features.of_frames(heard, count // HOP)
        x = features.transpose(1, 2) * _mask(position * rate - 1, length, count // HOP, HOP)
        x = _between(memory.join(x), 0, -1).transpose(1, 2)[:, None]
        # At half the rate again one late: each reads one frame past its own.
        late = self._late
        steps = count // STEM_HOP
        # The finest mask of each rate, of which every layer's is a part.
        masks = _mask(position * STEM_RATE - late, length, steps + late - 1, STEM_HOP)
        x = functional.relu(self.first(x)).flatten(1, 2).transpose(1, 2) * _between(masks, late - 1, 0)
        x = memory.join(x).transpose(1, 2).reshape(-1, self._channels, self._bands, steps + 2)
        mask = _between(masks, late - 2, -1)
        x = functional.relu(self.second(x)).flatten(1, 2).transpose(1, 2) * mask
        x = functional.relu(self.flatten(x)) * mask
        offset = 2
        for block in self.early:
            offset += cast(_Taps, block).ahead
            x = block(memory.join(x), _between(masks, late - offset, 1 - offset))
        x = _between(memory.join(x), 0, -self._odd)
        x = torch.cat([_between(x, 0, -2)[:, ::2], _between(x, 1, -1)[:, ::2], x[:, 2::2]], dim=2)
        frames = count // FRAME_HOP
        masks = _mask(position - self.delay, length, frames + self.delay - self._delays[0], FRAME_HOP)
        later = [self._mask_of(masks, delay) for delay in self._delays]
        x = functional.relu(self.down(x)) * later[0]
        for block, mask in zip(self.shared, later[1:], strict=False):
            x = block(memory.join(x), mask)
        mask = later[len(self.shared)]
        x = functional.relu(self.to_keyword(x)) * mask
        for block, mask in zip(self.keyword, later[1 + len(self.shared) :], strict=True):
            x = block(memory.join(x), mask)
        return self.head(x), memory.state()

    def _mask_of(self, masks: Tensor, delay: int) -> Tensor:
        return _between(masks, self.delay - delay, self._delays[0] - delay)


class _Memory:
    """Hands each layer its past, and gathers what is to be the next call's."""

    def __init__(self, state: Tensor, pasts: list[_Past]) -> None:
        self._parts = iter(zip(torch.split(state, [past.size for past in pasts], dim=1), pasts, strict=True))
        self._next: list[Tensor] = []

    def join(self, x: Tensor) -> Tensor:
        """[B, T, C] with the layer's past before it."""
        flat, past = next(self._parts)
        joined = torch.cat([flat.reshape(-1, past.frames, past.width), x], dim=1)
        self._next.append(joined[:, -past.frames :].reshape(-1, past.size))
        return joined

    def state(self) -> Tensor:
        return torch.cat(self._next, dim=1)


def _between(x: Tensor, first: int, last: int) -> Tensor:
    """Frames of [B, T, C] from `first` on, without the last `-last`."""
    return x[:, first:last] if last else x[:, first:] if first else x


def _mask(first: Tensor, length: Tensor, count: int, hop: int) -> Tensor:
    """[B, count, 1] from frame `first` [B, 1] on: 1 where a frame's centre lies in the audio."""
    frame = first + torch.arange(count, device=first.device)
    return ((frame >= 0) & (frame * hop < length)).float()[:, :, None]


def _taps(blocks: nn.ModuleList) -> list[_Taps]:
    return [_Taps(cast(Block, block)) for block in blocks]


def _over_time(layers: nn.Sequential) -> nn.Conv2d:
    """The convolution with its norm in it, padded over frequency only."""
    given = cast(nn.Conv2d, layers[0])
    weight, bias = _folded(given, layers[1])
    made = nn.Conv2d(given.in_channels, given.out_channels, 3, cast(tuple[int, int], given.stride), (1, 0))
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


def _folded(convolution: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with the norm that follows it in it."""
    given = cast(nn.Conv2d, convolution)
    weight = given.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if given.bias is None else given.bias.detach().double()
    if norm is not None:
        own = cast(nn.BatchNorm2d, norm)
        assert own.running_mean is not None
        assert own.running_var is not None
        scale = own.weight.detach().double() / torch.sqrt(own.running_var.double() + own.eps)
        weight = weight * scale[:, None, None, None]
        bias = (bias - own.running_mean.double()) * scale + own.bias.detach().double()
    return weight.float(), bias.float()
