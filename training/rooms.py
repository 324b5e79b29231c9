"""Rooms that nobody recorded: impulse responses of shoeboxes by the image source method (Allen & Berkley 1979),
computed by pyroomacoustics (Scheibler et al. 2018).

As the data's own responses are, they begin 2.5 ms before the direct sound and peak at 0.9.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyroomacoustics
import soundfile

from training.audio_cache import SAMPLE_RATE_HZ, Waveform
from training.augment import DIRECT_SOUND_SAMPLES, drawn_for
from training.manifest import Data, Recording

CORPUS = "simulated"
PEAK = 0.9
# From a furnished office to a stairwell; the largest rooms do not get as dry as the first.
T60_S = (0.2, 1.0)
SIZE_M = ((3.0, 3.0, 2.4), (9.0, 7.0, 3.6))
WALL_M = 0.4  # nobody stands closer
NEAR_M, FAR_M = 0.3, 3.0


@dataclass(frozen=True, slots=True)
class Room:
    """An impulse response, and the reverberation time (ISO 3382: extrapolated from 30 dB of decay) that it has."""

    t60_s: float
    response: Waveform


def simulate(rng: np.random.Generator, t60_s: tuple[float, float] = T60_S) -> Room:
    """A room, a speaker and a microphone in it, drawn from `rng`; `t60_s` is what Sabine's formula is asked for."""
    while True:
        size = rng.uniform(*SIZE_M)
        wanted_s = float(rng.uniform(*t60_s))
        speaker, microphone = (rng.uniform(WALL_M, size - WALL_M) for _ in range(2))
        distance_m = float(np.linalg.norm(speaker - microphone))
        if not NEAR_M <= distance_m <= FAR_M:
            continue
        try:
            absorption, reflections = pyroomacoustics.inverse_sabine(wanted_s, size)
        except ValueError:
            # So large a room cannot be so dry.
            continue
        room = pyroomacoustics.ShoeBox(
            size, fs=SAMPLE_RATE_HZ, materials=pyroomacoustics.Material(absorption), max_order=reflections
        )
        room.add_source(speaker)
        room.add_microphone(microphone)
        room.compute_rir()
        response = np.asarray(room.rir[0][0], dtype=np.float32)
        # Its filters for parts of a sample look back by half their length.
        delay = pyroomacoustics.constants.get("frac_delay_length") // 2
        direct = delay + round(distance_m / room.c * SAMPLE_RATE_HZ)
        return Room(_t60_s(response), _begun_before(response, direct))


def simulated(folder: Path, count: int, seed: int) -> list[Recording]:
    """So many rooms for training, computed once and kept in `folder`."""
    made_with = f"{seed}:{T60_S}:{SIZE_M}:{WALL_M}:{NEAR_M}:{FAR_M}:{pyroomacoustics.__version__}"
    own = folder / f"rooms-{hashlib.sha256(made_with.encode()).hexdigest()[:20]}"
    return [
        Recording(path, f"{CORPUS}/{path.stem}", CORPUS, "train", "shoebox", soundfile.info(path).duration)
        for path in _files(own, count, seed)
    ]


def evaluation_rooms(t60s_s: Sequence[float]) -> list[Room]:
    """One for each reverberation time that is asked for; never one of `simulated`, whatever its seed."""
    return [simulate(drawn_for(f"evaluation: room {number}"), (t60_s, t60_s)) for number, t60_s in enumerate(t60s_s)]


def with_rooms(data: Data, count: int, folder: Path, seed: int) -> Data:
    """The data, with `count` simulated rooms beside those of its train split."""
    return replace(data, rooms=(*data.rooms, *simulated(folder, count, seed)))


def _files(folder: Path, count: int, seed: int) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:04d}.flac"
        if not path.is_file():
            response = simulate(drawn_for(f"training {seed}: room {number}")).response
            # Of one name for each process, should two make the same room at once.
            partial = folder / f"{number:04d}-{np.random.default_rng().integers(2**32)}.partial"
            soundfile.write(partial, response, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_24")
            partial.replace(path)
        yield path


def _t60_s(response: Waveform) -> float:
    found = pyroomacoustics.experimental.measure_rt60(response, fs=SAMPLE_RATE_HZ, decay_db=30)
    return float(found)


def _begun_before(response: Waveform, direct: int) -> Waveform:
    start = direct - DIRECT_SOUND_SAMPLES
    begun = response[start:] if start >= 0 else np.pad(response, (-start, 0))
    scaled: Waveform = (begun * (PEAK / np.abs(begun).max())).astype(np.float32)
    return scaled
