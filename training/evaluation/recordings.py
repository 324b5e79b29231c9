"""What is sent to the service: recordings as they are, or mixed with unseen noise."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from training.audio_cache import SAMPLE_RATE_HZ, Waveform, decode
from training.augment import mix
from training.evaluation.client import Upload
from training.manifest import Clip, Recording

_TYPES = {".opus": "audio/ogg", ".ogg": "audio/ogg", ".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg"}


def as_recorded(clip: Clip | Recording) -> Upload:
    """The file's own bytes."""
    return Upload(clip.path.read_bytes(), _type(clip.path))


def beginning(path: Path, longest_s: float) -> Upload:
    """The file's own bytes, or where it is longer its first `longest_s` seconds."""
    if soundfile.info(path).duration <= longest_s:
        return Upload(path.read_bytes(), _type(path))
    return as_wav(decode(path)[: int(longest_s * SAMPLE_RATE_HZ)])


def with_noise(clip: Clip, noises: Sequence[Recording], snr_db: float) -> Upload:
    """The clip with one of the noises at `snr_db`; which one, and where in it, is fixed by the clip's path."""
    digest = hashlib.sha256(clip.key.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    speech = decode(clip.path)
    noise = decode(noises[int(rng.integers(len(noises)))].path)
    start = int(rng.integers(max(1, len(noise) - len(speech))))
    piece = np.resize(noise[start:], len(speech)) if len(noise) - start < len(speech) else noise[start:][: len(speech)]
    return as_wav(mix(speech, piece, snr_db))


def as_wav(waveform: Waveform) -> Upload:
    """16-bit WAV, scaled down only where it would clip."""
    peak = float(np.abs(waveform).max(initial=0.0))
    scaled = waveform / np.float32(max(1.0, peak / 0.99))
    stream = io.BytesIO()
    soundfile.write(stream, scaled, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return Upload(stream.getvalue(), "audio/wav")


def _type(path: Path) -> str:
    return _TYPES.get(path.suffix.lower(), "audio/wav")
