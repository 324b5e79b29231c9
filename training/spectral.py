"""Changes of the log-mel features of a training batch: voices, channels and gaps that nobody recorded.

Each clip's draws are its own, from one generator, which makes step n repeatable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.bounds import Count, CountOrZero, NotNegative, PositiveSpan, Probability
from training.students.frontend import CENTRE, FLOOR, HIGHEST_HZ, LOWEST_HZ, SPREAD, hz_to_mel, mel_to_hz

DB_PER_UNIT = SPREAD * 10 / math.log(10)  # log-mel features count natural logarithms of power / SPREAD


@dataclass(frozen=True, slots=True)
class SpectralRecipe:
    """Probabilities per clip, ranges of factors, decibels, mels and frames."""

    # Vocal tract length perturbation (Jaitly & Hinton 2013): another speaker says the same.
    p_warp: Probability = 0.0
    warp: PositiveSpan = (0.88, 1.12)
    # A gain that varies along frequency (Nam et al. 2022, FilterAugment): another microphone or room.
    p_colour: Probability = 0.0
    colour_db: NotNegative = 6.0
    colour_points: Count = 5
    # SpecAugment (Park et al. 2019).
    frequency_stripes: CountOrZero = 2
    widest_mels: CountOrZero = 10
    time_stripes: CountOrZero = 2
    longest_frames: CountOrZero = 10


class SpectralAugment:
    """Draws once for a batch of `count` clips; then maps features [B, mels, T] to the same shape.

    `warped` [B] is True for clips whose voice became somebody else's: no speaker label fits them.
    """

    def __init__(self, recipe: SpectralRecipe, count: int, generator: torch.Generator) -> None:
        self._recipe = recipe
        self._generator = generator
        self.warped = self._rand(count) < recipe.p_warp
        low, high = recipe.warp
        self._factor = torch.where(self.warped, low + (high - low) * self._rand(count), 1.0)
        self._coloured = self._rand(count) < recipe.p_colour

    def __call__(self, features: Tensor) -> Tensor:
        features = self._warp(features)
        features = self._colour(features)
        features = self._stripes(features, 1, self._recipe.frequency_stripes, self._recipe.widest_mels)
        return self._stripes(features, 2, self._recipe.time_stripes, self._recipe.longest_frames)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def _warp(self, features: Tensor) -> Tensor:
        """Band m takes what was at its centre frequency divided by the clip's factor."""
        if not bool(self.warped.any()):
            return features
        bands = features.shape[1]
        lowest, highest = hz_to_mel(torch.tensor(LOWEST_HZ)), hz_to_mel(torch.tensor(HIGHEST_HZ))
        step = (highest - lowest) / (bands + 1)
        centre_hz = mel_to_hz(lowest + step * torch.arange(1, bands + 1))
        source_mel = hz_to_mel(centre_hz[None, :] / self._factor[:, None])
        position = ((source_mel - lowest) / step - 1).clamp(0, bands - 1)
        below = position.floor().clamp(max=bands - 2)
        share = (position - below)[:, :, None].to(features.dtype)
        index = below.long()[:, :, None].expand(-1, -1, features.shape[2])
        return features.gather(1, index) * (1 - share) + features.gather(1, index + 1) * share

    def _colour(self, features: Tensor) -> Tensor:
        """Add a broken line over frequency, from `colour_points` gains within +-`colour_db`."""
        gains_db = (self._rand(features.shape[0], 1, self._recipe.colour_points) * 2 - 1) * self._recipe.colour_db
        gains_db = gains_db * self._coloured[:, None, None]
        line = torch.nn.functional.interpolate(gains_db, size=features.shape[1], mode="linear", align_corners=True)
        changed = features + (line / DB_PER_UNIT).transpose(1, 2)
        return changed.clamp(min=(math.log(FLOOR) - CENTRE) / SPREAD)

    def _stripes(self, features: Tensor, axis: int, stripes: int, widest: int) -> Tensor:
        size = features.shape[axis]
        position = torch.arange(size)
        for _ in range(stripes):
            width = self._rand(features.shape[0], 1) * widest
            start = self._rand(features.shape[0], 1) * (size - width)
            hidden = (position >= start) & (position < start + width)
            shape = (features.shape[0], size, 1) if axis == 1 else (features.shape[0], 1, size)
            features = features.masked_fill(hidden.reshape(shape), 0.0)
        return features
