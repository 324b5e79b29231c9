"""What is sent to the service: recordings as they are, or mixed with unseen noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from training.audio_cache import SAMPLE_RATE_HZ, Waveform, decode
from training.augment import drawn_for, level_of, mix, reverberate
from training.evaluation.client import Upload
from training.manifest import Clip, Recording

_TYPES = {".opus": "audio/ogg", ".ogg": "audio/ogg", ".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg"}

# A sneeze in five seconds of nothing: what lies beside it, made as loud, would be a codec's noise. So another stretch
# is drawn while one is below this share of the whole recording's level.
LEAST_LEVEL = 0.05
TRIES = 50
# Counts changes of what is sent: figures of different ones are not comparable.
DRAW = 2


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
    return as_wav(_noisy(decode(clip.path), clip, noises, snr_db))


def disturbed(clip: Clip, noises: Sequence[Recording], snr_db: float | None, rooms: Sequence[Waveform] = ()) -> Upload:
    """The clip said in one of the rooms, then with one of the noises at `snr_db` below what the room made of it.

    No rooms leave it dry, no `snr_db` quiet. Which room is fixed by the clip's path too.
    """
    samples = decode(clip.path)
    if rooms:
        samples = reverberate(samples, rooms[int(drawn_for(f"room of {clip.key}").integers(len(rooms)))])
    return as_wav(samples if snr_db is None else _noisy(samples, clip, noises, snr_db))


def as_wav(waveform: Waveform) -> Upload:
    """16-bit WAV, scaled down only where it would clip."""
    peak = float(np.abs(waveform).max(initial=0.0))
    scaled = waveform / np.float32(max(1.0, peak / 0.99))
    stream = io.BytesIO()
    soundfile.write(stream, scaled, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return Upload(stream.getvalue(), "audio/wav")


def _type(path: Path) -> str:
    return _TYPES.get(path.suffix.lower(), "audio/wav")


def _noisy(speech: Waveform, clip: Clip, noises: Sequence[Recording], snr_db: float) -> Waveform:
    rng = drawn_for(clip.key)
    noise = _noise(noises[int(rng.integers(len(noises)))].path)
    for _ in range(TRIES):
        start = int(rng.integers(max(1, len(noise) - len(speech))))
        piece = np.resize(noise[start:], len(speech))
        if level_of(piece) >= LEAST_LEVEL * level_of(noise):
            break
    return mix(speech, piece, snr_db)


# A split's noises are a few minutes, and each is mixed with hundreds of clips.
_noise = lru_cache(maxsize=100)(decode)
