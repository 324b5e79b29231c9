"""Corruptions of a training crop: speed, room, noise, telephone band, gain.

Every function takes and returns float32 mono at 16 kHz and draws only from the generator it is given,
so that step n of a run is the same whether or not the run was interrupted before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import soxr
from pydantic import Field

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache, Waveform
from training.bounds import Positive, Probability, Span
from training.manifest import Recording

# The rooms in our data are cut 2.5 ms before the direct sound.
DIRECT_SOUND_SAMPLES = int(0.0025 * SAMPLE_RATE_HZ)
LONGEST_ROOM_SAMPLES = SAMPLE_RATE_HZ
MU = 255.0


@dataclass(frozen=True, slots=True)
class AugmentRecipe:
    """Probabilities and ranges; levels in dB, speeds as factors."""

    speeds: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.9, 1.0, 1.1)
    p_noise: Probability = 0.7
    snr_db: Span = (0.0, 25.0)
    p_white: Probability = 0.1
    p_room: Probability = 0.25
    p_narrowband: Probability = 0.15
    p_telephone: Probability = 0.1
    level_dbfs: Span = (-40.0, -14.0)
    # From this share of the schedule on, noise, rooms and bands are `calm_factor` times as likely: the
    # last updates and the averaged statistics then see mostly what will be served.
    calm_after: Probability = 1.0
    calm_factor: Probability = 1.0


class Augmenter:
    """Draws noises and rooms from the recordings it was given (those of the train split)."""

    def __init__(
        self,
        recipe: AugmentRecipe,
        cache: AudioCache,
        noises: Sequence[Recording],
        rooms: Sequence[Recording],
    ) -> None:
        self._recipe = recipe
        self._cache = cache
        self._noises = list(noises)
        self._rooms = list(rooms)

    def speed(self, rng: np.random.Generator) -> int:
        """Index into the recipe's speeds; each speed of a person is a speaker class of its own."""
        return int(rng.integers(len(self._recipe.speeds)))

    def corrupt(self, speech: Waveform, rng: np.random.Generator, *, progress: float = 0.0) -> Waveform:
        """Room, then noise, then channel, then level: the order in which they happen to real speech.

        `progress` is the share of the schedule that has passed.
        """
        recipe = self._recipe
        likely = recipe.calm_factor if progress >= recipe.calm_after else 1.0
        if self._rooms and rng.random() < likely * recipe.p_room:
            room = self._rooms[int(rng.integers(len(self._rooms)))]
            speech = reverberate(speech, self._cache.read(room.path, 0, LONGEST_ROOM_SAMPLES))
        if rng.random() < likely * recipe.p_noise:
            speech = mix(speech, self.noise(len(speech), rng), float(rng.uniform(*recipe.snr_db)))
        if rng.random() < likely * recipe.p_narrowband:
            speech = narrowband(speech)
        elif rng.random() < likely * recipe.p_telephone:
            speech = telephone(speech)
        return at_level(speech, float(rng.uniform(*recipe.level_dbfs)))

    def noise(self, length: int, rng: np.random.Generator) -> Waveform:
        """A stretch of recorded noise (tiled when short), or white noise."""
        if not self._noises or rng.random() < self._recipe.p_white:
            return rng.standard_normal(length).astype(np.float32)
        path = self._noises[int(rng.integers(len(self._noises)))].path
        available = self._cache.length(path)
        start = int(rng.integers(available - length)) if available > length else 0
        stretch = np.resize(self._cache.read(path, start, start + length), length)
        # A stretch of digital silence has no level to be set.
        return stretch if stretch.any() else rng.standard_normal(length).astype(np.float32)


def drawn_for(name: str) -> np.random.Generator:
    """The same for the same name, whatever was drawn before."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def change_speed(waveform: Waveform, factor: float) -> Waveform:
    """Play `factor` times faster; pitch moves along, so it counts as another person's voice."""
    if factor == 1.0 or len(waveform) == 0:
        return waveform
    return np.asarray(soxr.resample(waveform, factor, 1.0, quality="LQ"), dtype=np.float32)


def reverberate(speech: Waveform, response: Waveform) -> Waveform:
    """Convolve, keep direct sound in place, same length and same energy as before."""
    full = len(speech) + len(response) - 1
    size = 1 << (full - 1).bit_length()
    full_wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)
    wet: Waveform = full_wet[DIRECT_SOUND_SAMPLES : DIRECT_SOUND_SAMPLES + len(speech)].astype(np.float32)
    return wet * np.float32(level_of(speech) / max(level_of(wet), 1e-9))


def mix(speech: Waveform, noise: Waveform, snr_db: float) -> Waveform:
    """Add noise at `snr_db`, measured over the samples in which there is speech signal at all."""
    spoken = speech[speech != 0]
    if len(spoken) == 0:
        return noise
    scale = level_of(spoken) / max(level_of(noise), 1e-9) * 10 ** (-snr_db / 20)
    return speech + noise * np.float32(scale)


def narrowband(waveform: Waveform) -> Waveform:
    """What is left of speech that was once recorded at 8 kHz."""
    low = soxr.resample(waveform, SAMPLE_RATE_HZ, 8000, quality="LQ")
    high = np.asarray(soxr.resample(low, 8000, SAMPLE_RATE_HZ, quality="LQ"), dtype=np.float32)
    return np.resize(high, len(waveform)) if len(high) < len(waveform) else high[: len(waveform)]


def telephone(waveform: Waveform) -> Waveform:
    """8 kHz band and mu-law steps (ITU-T G.711's curve, continuous form)."""
    band = narrowband(waveform)
    peak = max(float(np.abs(band).max(initial=0.0)), 1e-9)
    unit = band / np.float32(peak)
    steps = np.rint(np.sign(unit) * np.log1p(MU * np.abs(unit)) / np.log1p(MU) * 127) / 127
    decoded = np.sign(steps) * np.expm1(np.abs(steps) * np.log1p(MU)) / MU * peak
    return np.asarray(decoded, dtype=np.float32)


def at_level(waveform: Waveform, level_dbfs: float) -> Waveform:
    """Scale to a root-mean-square level, then clip to full scale as a converter would."""
    scaled = waveform * np.float32(10 ** (level_dbfs / 20) / max(level_of(waveform), 1e-6))
    clipped: Waveform = np.clip(scaled, -1.0, 1.0)
    return clipped


def level_of(waveform: Waveform) -> float:
    """Root of the mean square; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))) if len(waveform) else 0.0
