"""Each corruption does what its name says, in decibels and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SAMPLE_RATE_HZ, Samples, voice
from training.audio_cache import AudioCache
from training.augment import (
    DIRECT_SOUND_SAMPLES,
    Augmenter,
    AugmentRecipe,
    at_level,
    change_speed,
    mix,
    narrowband,
    reverberate,
    telephone,
)
from training.manifest import Recording


def hiss(length: int, *, seed: int = 0, level: float = 0.1) -> Samples:
    return (level * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def rms(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def band_db(samples: Samples, low_hz: float, high_hz: float) -> float:
    """Energy between two frequencies."""
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    frequency = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE_HZ)
    return float(10 * np.log10(spectrum[(frequency >= low_hz) & (frequency < high_hz)].sum() + 1e-20))


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5, 30.0])
def test_mix_has_the_asked_ratio_over_the_speech(snr_db: float) -> None:
    speech = np.concatenate([np.zeros(16_000, dtype=np.float32), hiss(16_000, level=0.03)])
    added = mix(speech, hiss(32_000, seed=1), snr_db) - speech
    assert 20 * np.log10(rms(speech[16_000:]) / rms(added)) == pytest.approx(snr_db, abs=0.1)


def test_mix_without_speech_is_the_noise() -> None:
    noise = hiss(1000)
    assert np.array_equal(mix(np.zeros(1000, dtype=np.float32), noise, 10.0), noise)


def test_mix_with_silent_noise_is_the_speech() -> None:
    speech = hiss(1000)
    assert np.array_equal(mix(speech, np.zeros(1000, dtype=np.float32), 10.0), speech)


def decaying_room() -> Samples:
    response = hiss(8000, seed=3) * np.exp(-np.arange(8000, dtype=np.float32) / 1500) * 0.3
    response[:DIRECT_SOUND_SAMPLES] = 0
    response[DIRECT_SOUND_SAMPLES] = 1.0
    return response


def test_room_keeps_length_and_energy() -> None:
    speech = voice(1.3)
    wet = reverberate(speech, decaying_room())
    assert len(wet) == len(speech)
    assert rms(wet) == pytest.approx(rms(speech), rel=1e-4)


def test_room_keeps_the_direct_sound_in_place() -> None:
    click = np.zeros(16_000, dtype=np.float32)
    click[5000] = 1.0
    assert int(np.abs(reverberate(click, decaying_room())).argmax()) == 5000


def test_room_without_reflections_changes_nothing() -> None:
    speech, anechoic = voice(1.0), np.zeros(1000, dtype=np.float32)
    anechoic[DIRECT_SOUND_SAMPLES] = 0.3
    assert np.abs(reverberate(speech, anechoic) - speech).max() < 1e-6


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speed_changes_length_and_pitch_by_its_factor(factor: float) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(32_000) / SAMPLE_RATE_HZ).astype(np.float32)
    faster = change_speed(tone, factor)
    peak_hz = np.abs(np.fft.rfft(faster)).argmax() * SAMPLE_RATE_HZ / len(faster)
    assert len(faster) == pytest.approx(32_000 / factor, abs=1)
    assert peak_hz == pytest.approx(1000 * factor, abs=1)


def test_narrowband_removes_what_lies_above_four_kilohertz() -> None:
    wide = hiss(32_000)
    narrow = narrowband(wide)
    assert len(narrow) == len(wide)
    assert band_db(narrow, 4000, 8000) < band_db(wide, 4000, 8000) - 30


def test_narrowband_keeps_what_lies_below_three_kilohertz() -> None:
    wide = hiss(32_000)
    assert band_db(narrowband(wide), 100, 3000) == pytest.approx(band_db(wide, 100, 3000), abs=0.1)


def test_telephone_stays_within_the_band_s_peak() -> None:
    wide = hiss(32_000)
    assert np.abs(telephone(wide)).max() <= np.abs(narrowband(wide)).max() * (1 + 1e-6)


def test_telephone_steps_are_38_db_below_the_speech() -> None:
    # G.711 has about 38 dB over a wide range of levels; the steps here are as fine.
    wide = voice(1.0)
    band = narrowband(wide)
    error = telephone(wide) - band
    assert 30 < 20 * np.log10(rms(band) / rms(error)) < 45


@pytest.mark.parametrize("level_dbfs", [-40.0, -26.0, -14.0])
def test_level_is_exact(level_dbfs: float) -> None:
    assert 20 * np.log10(rms(at_level(hiss(16_000), level_dbfs))) == pytest.approx(level_dbfs, abs=1e-3)


def test_level_clips_at_full_scale() -> None:
    assert np.abs(at_level(hiss(16_000), 0.0)).max() == 1.0


def augmenter(recipe: AugmentRecipe) -> Augmenter:
    """With one short noise, one silent noise and one room."""
    sounds = {"short": hiss(3000), "silent": np.zeros(40_000, dtype=np.float32), "room": decaying_room()}
    samples = np.concatenate(list(sounds.values()))
    ends = np.cumsum([len(sound) for sound in sounds.values()])
    index = {name: (int(end) - len(sounds[name]), int(end)) for name, end in zip(sounds, ends, strict=True)}
    cache = AudioCache((samples * 32767).clip(-32768, 32767).astype(np.int16), index)
    recordings = {name: Recording(Path(name), name, "made", "train", "", 1.0) for name in sounds}
    return Augmenter(recipe, cache, [recordings["short"], recordings["silent"]], [recordings["room"]])


@pytest.mark.parametrize("speech", [voice(1.0), np.zeros(16_000, dtype=np.float32), np.zeros(7, dtype=np.float32)])
def test_corrupted_speech_is_finite_within_full_scale_and_as_long(speech: Samples) -> None:
    all_at_once = augmenter(AugmentRecipe(p_noise=0.8, p_room=0.5, p_narrowband=0.4, p_telephone=0.5))
    for seed in range(60):
        corrupted = all_at_once.corrupt(speech, np.random.default_rng(seed))
        assert corrupted.shape == speech.shape
        assert corrupted.dtype == np.float32
        assert np.abs(corrupted).max() <= 1.0


def test_corruption_repeats_with_its_generator() -> None:
    speech = voice(1.0)
    once, twice = (augmenter(AugmentRecipe()).corrupt(speech, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(once, twice)


def test_corruption_leaves_the_speech_it_was_given() -> None:
    speech = voice(1.0)
    before = speech.copy()
    augmenter(AugmentRecipe(p_noise=1.0, p_room=1.0)).corrupt(speech, np.random.default_rng(0))
    assert np.array_equal(speech, before)


@pytest.mark.parametrize("length", [500, 3000, 20_000, 40_000])
def test_noise_is_as_long_as_asked_and_never_silent(length: int) -> None:
    source = augmenter(AugmentRecipe())
    for seed in range(10):
        noise = source.noise(length, np.random.default_rng(seed))
        assert len(noise) == length
        assert noise.any()
