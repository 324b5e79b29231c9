"""Every recording decoded once, as 16 kHz mono int16 in one memory-mapped file.

Opus costs about 4 ms for a second of audio; a training run reads each clip some fifty times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from training.errors import ManifestError
from training.files import cache_key

SAMPLE_RATE_HZ = 16_000

Waveform = npt.NDArray[np.float32]


class AudioCache:
    """Random access to decoded audio by file; build with `AudioCache.build`."""

    def __init__(self, samples: npt.NDArray[np.int16], index: dict[str, tuple[int, int]]) -> None:
        self._samples = samples
        self._index = index

    @classmethod
    def build(cls, folder: Path, paths: Sequence[Path]) -> AudioCache:
        """Open the cache for exactly these files, decoding them first where needed.

        Raises ManifestError for a file that does not decode.
        """
        if not paths:
            return cls(np.zeros(0, dtype=np.int16), {})
        stem = folder / cache_key(paths)
        data, table = stem.with_suffix(".pcm"), stem.with_suffix(".json")
        if not table.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _decode_all(data, table, paths)
        index = {key: (start, stop) for key, (start, stop) in json.loads(table.read_text()).items()}
        return cls(np.memmap(data, dtype=np.int16, mode="r"), index)

    def length(self, path: Path) -> int:
        """Length in samples."""
        start, stop = self._index[str(path)]
        return stop - start

    def read(self, path: Path, start: int = 0, stop: int | None = None) -> Waveform:
        """Samples [start, stop) as float32 in [-1, 1]; fewer where the recording ends."""
        first, last = self._index[str(path)]
        end = last if stop is None else min(first + stop, last)
        return self._samples[first + start : end].astype(np.float32) / np.float32(32768)


def decode(path: Path) -> Waveform:
    """Read one file as 16 kHz mono float32. Raises ManifestError."""
    try:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ManifestError(f"{path} does not decode: {error}") from error
    mono = samples.mean(axis=1)
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    return np.asarray(mono, dtype=np.float32)


def _decode_all(data: Path, table: Path, paths: Sequence[Path]) -> None:
    def as_int16(path: Path) -> npt.NDArray[np.int16]:
        return np.clip(np.rint(decode(path) * 32768), -32768, 32767).astype(np.int16)

    index: dict[str, tuple[int, int]] = {}
    position = 0
    # Two runs may build the same cache at once; each writes files of its own and the later one wins.
    partial = data.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as stream, ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, samples in zip(paths, pool.map(as_int16, paths), strict=True):
            stream.write(samples.tobytes())
            index[str(path)] = (position, position + len(samples))
            position += len(samples)
    partial.replace(data)
    partial_table = table.with_suffix(f".{os.getpid()}.partial-json")
    partial_table.write_text(json.dumps(index))
    partial_table.replace(table)
