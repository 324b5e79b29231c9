"""That a name and a number mean one network: the one whose embeddings are in the database.

A store never gives a number twice, but two stores may, as where each image is built with a fresh one; scores between
their embeddings would mean nothing, and look like any others. So the database keeps, for each space, what its network
makes of a signal that never changes, and whoever comes with another network is refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model_store.verify import SAME_SPACE
from service.audio import SAMPLE_RATE_HZ, Waveform
from service.engine import Engine
from service.errors import ModelMismatchError
from service.speakers.store import ProfileStore

Array = npt.NDArray[np.float32]

PROBE_S = 2.0


class Spaces:
    """Of one database. Blocking; from any thread."""

    def __init__(self, store: ProfileStore) -> None:
        self._store = store
        self._known: set[str] = set()

    def knows(self, engine: Engine) -> bool:
        """Whether the engine's network was found to be the space's."""
        return engine.bundle.digest in self._known

    def require(self, engine: Engine) -> None:
        """Raises ModelMismatchError where another network has the space's name, and StorageUnavailableError."""
        own = mark_of(engine)
        found = self._store.claim(engine.space, own)
        if found.shape != own.shape or not float(found @ own) >= SAME_SPACE:
            name = "@".join(map(str, engine.space))
            raise ModelMismatchError(
                f"this database has speakers of another network that was called {name} too; publish this one under a "
                "number of its own, into the store that has that one, or begin with an empty database"
            )
        self._known.add(engine.bundle.digest)


def mark_of(engine: Engine) -> Array:
    """What its network makes of the probe, [D] of unit length."""
    return engine.run([Waveform(probe())], "speaker")[0].speaker_embedding


def probe() -> Array:
    """Something like a voice: harmonics of a pitch that falls, through two resonances, in syllables. Never change it:
    databases hold what networks make of it."""
    time_s = np.arange(int(PROBE_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    pitch_hz = 160 - 20 * time_s
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ
    wave = np.zeros_like(time_s)
    for harmonic in range(1, 25):
        frequency_hz = harmonic * pitch_hz
        gain = sum(np.exp(-(((frequency_hz - formant_hz) / 250) ** 2)) for formant_hz in (500, 1500)) + 0.02
        wave += gain * np.sin(harmonic * phase) / harmonic
    syllables = 0.5 * (1 - np.cos(2 * np.pi * 4 * time_s))
    loud = wave * syllables
    return np.asarray(0.3 * loud / np.abs(loud).max(), dtype=np.float32)
