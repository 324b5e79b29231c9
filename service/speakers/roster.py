"""Everyone of a tenant whom a clip can be compared with, held in memory and brought up to date before each comparison.

The database stays what counts: a roster asks for its revision each time and reads what has changed since, whichever
process changed it. Rosters that nobody asks for are dropped.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine import Engine
from service.speakers.scoring import Score, compare, near, profile_vector
from service.speakers.store import Change, Place, Profile, ProfileStore

Array = npt.NDArray[np.float32]

# Profiles read at once: others get their turn, and a deadline can pass, in between.
PAGE = 1000
# What is held of deleted speakers in a process that nobody asks is gone after this.
UNUSED_S = 300.0
# A speaker's id and places in lists and dictionaries, beside the vectors.
OVERHEAD_BYTES = 300
# By which factor room grows.
SPARE = 1.125
NEVER = -1
BEGINNING = Place(NEVER, 0)

Scored = tuple[str, Score]


@dataclass(frozen=True, slots=True)
class Found:
    """The best in their order, how many were compared, and how many cannot be."""

    best: list[Scored]
    compared: int
    skipped: int


class Roster:
    """Of one tenant and one model, with room for so many. One thread at a time."""

    def __init__(self, engine: Engine, required_speech_s: float, room: int) -> None:
        # Not the engine itself, which may be unloaded meanwhile.
        self._info, self._cohort = engine.speaker, engine.cohort
        self._own = {engine.space}
        self._required_s = required_speech_s
        self._forget_all(room)

    def _forget_all(self, room: int) -> None:
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._skipped: set[str] = set()
        # The first `len(self._ids)` rows are in use.
        self._vectors = np.zeros((room, self._info.dim), dtype=np.float32)
        self._near = np.zeros((room, 2), dtype=np.float32)
        self._place = BEGINNING
        self._revision = NEVER

    @property
    def memory_bytes(self) -> int:
        """An estimate."""
        return self._vectors.nbytes + self._near.nbytes + OVERHEAD_BYTES * (len(self._ids) + len(self._skipped))

    def catch_up(self, store: ProfileStore, tenant: str) -> bool:
        """Read a page of what has changed; whether nothing was left to read. Raises StorageUnavailableError."""
        # Asked first: what changes meanwhile is then read again, never missed.
        revision = store.revision(tenant)
        if revision < self._revision:
            # Another database, or one from a backup.
            self._forget_all(len(self._ids))
        if revision == self._revision:
            return True
        page = store.changes(tenant, after=self._place, limit=PAGE)
        if page:
            self._take(page)
            self._place = page[-1].place
            if self._place.revision < revision:
                return False
        if len(self._rows) + len(self._skipped) != store.count(tenant):
            for speaker_id in (self._rows.keys() | self._skipped) - store.ids(tenant):
                self.remove(speaker_id)
        self._revision = revision
        return True

    def best(self, test: Array, top_k: int) -> Found:
        """The `top_k` with the highest scores for one test [D] of unit length; equal ones in order of their ids."""
        count = len(self._ids)
        cosines, llrs = compare(self._vectors[:count], self._near[:count], test, self._info, self._cohort)
        likely = np.arange(count)
        if top_k < count:
            least = np.partition(llrs, count - top_k)[count - top_k]
            likely = np.flatnonzero(llrs >= least)
        order = sorted(likely.tolist(), key=lambda row: (-llrs[row], self._ids[row]))[:top_k]
        best = [(self._ids[row], Score(float(cosines[row]), float(llrs[row]))) for row in order]
        return Found(best, count, len(self._skipped))

    def remove(self, speaker_id: str) -> None:
        """Whoever was last takes the place."""
        self._skipped.discard(speaker_id)
        row = self._rows.pop(speaker_id, None)
        if row is None:
            return
        last = len(self._ids) - 1
        if row != last:
            self._ids[row], self._vectors[row], self._near[row] = self._ids[last], self._vectors[last], self._near[last]
            self._rows[self._ids[row]] = row
        self._ids.pop()
        self._vectors[last] = 0

    def _take(self, changes: Sequence[Change]) -> None:
        kept = [one for one in changes if one.models == self._own and one.speech_s >= self._required_s]
        for change in changes:
            self.remove(change.speaker_id)
        self._skipped |= {one.speaker_id for one in changes} - {one.speaker_id for one in kept}
        if not kept:
            return
        first, count = len(self._ids), len(self._ids) + len(kept)
        if count > len(self._vectors):
            room = max(count, int(len(self._vectors) * SPARE))
            self._vectors, self._near = _grown(self._vectors, room), _grown(self._near, room)
        vectors = _vectors(kept, self._info.dim)
        self._vectors[first:count] = vectors
        self._near[first:count] = near(vectors, self._cohort, self._info)
        for change in kept:
            self._rows[change.speaker_id] = len(self._ids)
            self._ids.append(change.speaker_id)


class TooManyError(Exception):
    """More speakers than may be held in memory."""


@dataclass(slots=True)
class _Held:
    roster: Roster
    used: float


class Rosters:
    """Those in use, least recently used first. From any thread; all but `expire` block."""

    def __init__(
        self,
        store: ProfileStore,
        *,
        required_speech_s: float,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._required_s = required_speech_s
        self._most_bytes = most_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str], _Held] = OrderedDict()

    def best(self, tenant: str, engine: Engine, test: Array, top_k: int) -> Found | None:
        """Everyone compared with one test [D], or None where a page was read and there may be more: ask again.
        Raises StorageUnavailableError, TooManyError."""
        key = (tenant, engine.bundle.digest)
        with self._lock:
            now = self._clock()
            held = self._held.get(key)
            if held is None:
                room = self._store.count(tenant)
                # A roster that has to grow must fit as well, or it would be read in vain.
                if room * SPARE * bytes_each(engine) > self._most_bytes:
                    raise TooManyError
                held = self._held[key] = _Held(Roster(engine, self._required_s, room), now)
            held.used = now
            self._held.move_to_end(key)
            complete = held.roster.catch_up(self._store, tenant)
            while self.memory_bytes > self._most_bytes:
                least, _ = self._held.popitem(last=False)
                if least == key:
                    raise TooManyError
            return held.roster.best(test, top_k) if complete else None

    @property
    def memory_bytes(self) -> int:
        """An estimate of what all hold."""
        return sum(held.roster.memory_bytes for held in self._held.values())

    def forget(self, tenant: str, speaker_id: str) -> None:
        """A deleted speaker is gone from memory too."""
        with self._lock:
            for (owner, _), held in self._held.items():
                if owner == tenant:
                    held.roster.remove(speaker_id)

    def expire(self) -> None:
        """Drop what was not used lately. Never waits: where someone is at work, the next call does it."""
        if not self._held or not self._lock.acquire(blocking=False):
            return
        try:
            now = self._clock()
            for key in [key for key, held in self._held.items() if now - held.used > UNUSED_S]:
                del self._held[key]
        finally:
            self._lock.release()


def bytes_each(engine: Engine) -> int:
    """An estimate of what a speaker takes."""
    return (engine.speaker.dim + 2) * np.dtype(np.float32).itemsize + OVERHEAD_BYTES


def vector_of(profile: Profile) -> Array:
    """[D], unit length."""
    return profile_vector(np.stack([entry.embedding for entry in profile.enrolments]))


def _vectors(changes: Sequence[Change], dim: int) -> Array:
    """As `vector_of`, for many at once, [n, D]."""
    counts = np.array([len(one.embeddings) for one in changes])
    raw = b"".join(embedding for one in changes for embedding in one.embeddings)
    embeddings = np.frombuffer(raw, dtype="<f4").reshape(-1, dim)
    means = np.add.reduceat(embeddings, np.cumsum(counts) - counts, axis=0) / counts[:, None]
    vectors: Array = (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    return vectors


def _grown(values: Array, rows: int) -> Array:
    grown = np.zeros((rows, *values.shape[1:]), dtype=values.dtype)
    grown[: len(values)] = values
    return grown
