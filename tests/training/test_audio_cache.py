"""Recordings decoded once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import voice
from tests.training.made_data import write_wav
from training.audio_cache import AudioCache, decode
from training.errors import ManifestError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One second at 16 kHz, and half a second."""
    paths = [tmp_path / "one.wav", tmp_path / "half.wav"]
    for path, seconds in zip(paths, (1.0, 0.5), strict=True):
        write_wav(path, voice(seconds))
    return paths


def test_cached_audio_is_the_file_s(files: list[Path], tmp_path: Path) -> None:
    cache = AudioCache.build(tmp_path / "cache", files)
    assert cache.length(files[1]) == 8000
    assert np.array_equal(cache.read(files[1]), decode(files[1]))


def test_stretch_ends_where_its_recording_ends(files: list[Path], tmp_path: Path) -> None:
    cache = AudioCache.build(tmp_path / "cache", files)
    assert np.array_equal(cache.read(files[0], 15_000, 17_000), decode(files[0])[15_000:])


def test_other_rates_and_channels_become_16_khz_mono(tmp_path: Path) -> None:
    time_s = np.arange(44_100) / 44_100
    left = (0.5 * np.sin(2 * np.pi * 1000 * time_s)).astype(np.float32)
    write_wav(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), rate_hz=44_100)
    samples = decode(tmp_path / "a.wav")
    assert samples.shape == (16_000,)
    assert np.abs(np.fft.rfft(samples)).argmax() == 1000
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.25, abs=0.005)


def test_second_build_decodes_nothing(files: list[Path], tmp_path: Path) -> None:
    AudioCache.build(tmp_path / "cache", files)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    AudioCache.build(tmp_path / "cache", files)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_dates_do_not_matter(files: list[Path], tmp_path: Path) -> None:
    AudioCache.build(tmp_path / "cache", files)
    before = set((tmp_path / "cache").iterdir())
    for file in files:
        os.utime(file, (0, 0))
    AudioCache.build(tmp_path / "cache", files)
    assert set((tmp_path / "cache").iterdir()) == before


def test_another_recording_as_long_is_decoded_anew(files: list[Path], tmp_path: Path) -> None:
    AudioCache.build(tmp_path / "cache", files)
    dates = files[0].stat()
    write_wav(files[0], voice(1.0, seed=1))
    os.utime(files[0], ns=(dates.st_atime_ns, dates.st_mtime_ns))
    cache = AudioCache.build(tmp_path / "cache", files)
    assert np.array_equal(cache.read(files[0]), decode(files[0]))


def test_changed_file_is_decoded_anew(files: list[Path], tmp_path: Path) -> None:
    AudioCache.build(tmp_path / "cache", files)
    write_wav(files[0], voice(0.7, seed=1))
    assert AudioCache.build(tmp_path / "cache", files).length(files[0]) == 11_200


def test_file_that_is_no_audio_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    with pytest.raises(ManifestError, match=r"bad\.wav does not decode"):
        AudioCache.build(tmp_path / "cache", [tmp_path / "bad.wav"])
