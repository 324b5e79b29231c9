"""Finding the word in a clip by its level."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import SAMPLE_RATE_HZ, Samples
from training.alignment import frame_levels_db, loudest_speech


def clip_with_bursts(*bursts: tuple[float, float, float], seconds: float = 2.0) -> Samples:
    """Quiet hiss with noise bursts of (start_s, end_s, amplitude)."""
    rng = np.random.default_rng(0)
    samples = 0.001 * rng.standard_normal(int(seconds * SAMPLE_RATE_HZ))
    for start_s, end_s, amplitude in bursts:
        first, last = int(start_s * SAMPLE_RATE_HZ), int(end_s * SAMPLE_RATE_HZ)
        samples[first:last] += amplitude * rng.standard_normal(last - first)
    return samples.astype(np.float32)


@pytest.mark.parametrize(("start_s", "end_s"), [(0.5, 0.9), (0.0, 0.3), (1.2, 2.0), (0.3, 1.8)])
def test_burst_is_found_where_it_is(start_s: float, end_s: float) -> None:
    found = loudest_speech(clip_with_bursts((start_s, end_s, 0.2)))
    assert found == pytest.approx((start_s, end_s), abs=0.1)


def test_louder_of_two_is_found() -> None:
    found = loudest_speech(clip_with_bursts((0.2, 0.5, 0.05), (1.2, 1.5, 0.3)))
    assert found == pytest.approx((1.2, 1.5), abs=0.1)


def test_short_pause_is_bridged() -> None:
    found = loudest_speech(clip_with_bursts((0.4, 0.7, 0.2), (0.85, 1.2, 0.2)))
    assert found == pytest.approx((0.4, 1.2), abs=0.1)


def test_weak_onset_is_kept() -> None:
    # A fricative 17 dB below its vowel, 29 dB above the room.
    found = loudest_speech(clip_with_bursts((0.4, 0.6, 0.03), (0.6, 1.0, 0.2)))
    assert found == pytest.approx((0.4, 1.0), abs=0.1)


@pytest.mark.parametrize("length", [0, 1, 159, 160, 16_000])
def test_silence_stays_within_the_clip(length: int) -> None:
    start_s, end_s = loudest_speech(np.zeros(length, dtype=np.float32))
    assert 0 <= start_s <= end_s <= length / SAMPLE_RATE_HZ


def test_levels_are_in_decibels_re_full_scale() -> None:
    tone = (0.1 * np.sqrt(2) * np.sin(2 * np.pi * 1000 * np.arange(16_000) / SAMPLE_RATE_HZ)).astype(np.float32)
    levels = frame_levels_db(tone)
    assert levels.shape == (100,)
    assert levels[50] == pytest.approx(-20.0, abs=0.01)
