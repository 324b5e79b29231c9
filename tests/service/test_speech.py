"""Speech seconds, signal-to-noise ratio and clipping of made clips."""

from __future__ import annotations

import numpy as np
import pytest

from service.audio import Waveform
from service.speech import measure
from tests.conftest import SAMPLE_RATE_HZ, voice


def noise(seconds: float, level: float) -> np.ndarray:
    return (level * np.random.default_rng(0).standard_normal(int(seconds * SAMPLE_RATE_HZ))).astype(np.float32)


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(16_000, np.float32),
        noise(2.0, 1e-5),
        noise(2.0, 0.1),
        (0.1 * np.sin(2 * np.pi * 50 * np.arange(32_000) / SAMPLE_RATE_HZ)).astype(np.float32),
        np.full(16_000, 0.3, np.float32),
    ],
    ids=["digital silence", "faint hiss", "loud noise", "hum", "offset"],
)
def test_what_holds_no_voice_has_no_speech(samples: np.ndarray) -> None:
    assert measure(Waveform(samples)).speech_s == 0.0


def test_a_voice_between_pauses_is_measured_without_them() -> None:
    pause = noise(1.0, 0.0005)
    clip = np.concatenate([pause, voice(2.0), pause])
    # Four syllables of a quarter second each, and a tenth of a second on both sides of each.
    assert measure(Waveform(clip)).speech_s == pytest.approx(1.8, abs=0.2)


@pytest.mark.parametrize("snr_db", [30.0, 20.0, 10.0])
def test_the_signal_to_noise_ratio_is_about_right(snr_db: float) -> None:
    speech = np.concatenate([np.zeros(8_000, np.float32), voice(2.0), np.zeros(8_000, np.float32)])
    active = voice(2.0)
    level = np.sqrt(np.mean(active**2)) / 10 ** (snr_db / 20)
    measured = measure(Waveform(speech + noise(3.0, float(level)))).snr_db
    assert measured == pytest.approx(snr_db, abs=5.0)


def test_clipping_is_counted() -> None:
    clipped = np.clip(voice(2.0, level=3.0), -1, 1)
    assert measure(Waveform(clipped)).clipped_ratio > 0.05
    assert measure(Waveform(voice(2.0))).clipped_ratio == 0.0


def test_the_shortest_clip_can_be_measured() -> None:
    quality = measure(Waveform(np.full(10, 0.1, np.float32)))
    assert 0.0 <= quality.speech_s <= 0.01
