"""Speaker teachers: their embeddings of every recording, which the student's learns to predict.

They need no labels, so speech of people who are not told apart teaches the speaker branch as well. Resemblyzer
runs in the environment that `make peers` makes; a bundle of the built-in store can teach beside it. Vectors are
computed once and kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from model_store import Bundle, SpeakerInfo
from model_store.graph import SPEAKER, part_of
from model_store.inference import open_session
from training.audio_cache import AudioCache
from training.augment import change_speed
from training.beside import run_beside
from training.errors import TeacherError
from training.files import cache_key
from training.objectives.soft_targets import teaching_bundle

WIDTH = 256  # Resemblyzer's

Vector = npt.NDArray[np.float32]
Job = tuple[Path, float]  # a recording, and how fast it is played


class Voices:
    """Vectors of recordings, of each teacher one of unit length; build with `Voices.build` or `Voices.of_bundle`."""

    def __init__(self, vectors: npt.NDArray[np.float32], jobs: Sequence[Job], widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        self._vectors = vectors
        self._jobs = list(jobs)
        self._row = {(str(path), speed): row for row, (path, speed) in enumerate(jobs)}

    @classmethod
    def build(cls, folder: Path, paths: Sequence[Path], python: Path, speeds: Sequence[float] = (1.0,)) -> Voices:
        """Of exactly these recordings, played at each of these speeds, kept in `folder`; some 20 ms for each.
        Raises TeacherError."""
        kept = folder / f"voices-{_key(paths, speeds)}.npy"
        jobs = _jobs(paths, speeds)
        if not kept.is_file():
            _embed(jobs, kept, python)
        return cls(np.load(kept), jobs, [WIDTH])

    @classmethod
    def of_bundle(
        cls, folder: Path, paths: Sequence[Path], reference: str, audio: AudioCache, speeds: Sequence[float] = (1.0,)
    ) -> Voices:
        """What a bundle of the built-in store, NAME@VERSION, makes of them; some 5 ms for each. Raises TeacherError."""
        bundle, speaker = speaking_bundle(reference)
        kept = folder / f"voices-{bundle.digest[:12]}-{_key(paths, speeds)}.npy"
        jobs = _jobs(paths, speeds)
        if not kept.is_file():
            session = open_session(part_of(bundle.read(bundle.manifest.graph.file), [SPEAKER]), threads=1)
            vectors = np.zeros((len(jobs), speaker.dim), dtype=np.float32)
            for row, (path, speed) in enumerate(jobs):
                waveform = change_speed(audio.read(path), speed)[None]
                lengths = np.array([waveform.shape[1]], dtype=np.int64)
                vectors[row] = session.run([SPEAKER], {"waveform": waveform, "lengths": lengths})[0][0]
            if not np.isfinite(vectors).all():
                raise TeacherError(f"{reference} gave embeddings that are not numbers")
            partial = kept.with_suffix(f".{os.getpid()}.npy")  # another run may be making the same
            np.save(partial, vectors)
            partial.replace(kept)
        return cls(np.load(kept), jobs, [speaker.dim])

    def beside(self, other: Voices) -> Voices:
        """Both teachers' vectors of the same recordings."""
        if self._jobs != other._jobs:
            raise ValueError("the two teachers heard other recordings")
        return Voices(np.concatenate([self._vectors, other._vectors], axis=1), self._jobs, self.widths + other.widths)

    def of(self, path: Path, speed: float = 1.0) -> Vector:
        """The recording's vectors at that speed, one after the other [sum of widths]; zeros where there are none."""
        row = self._row.get((str(path), speed))
        return self.none() if row is None else self._vectors[row]

    def none(self) -> Vector:
        """Of what no teacher heard."""
        return np.zeros(sum(self.widths), dtype=np.float32)


class VoiceHead(nn.Module):
    """Predicts the teachers' vectors from the student's speaker embedding; not part of the student."""

    def __init__(self, width: int, widths: Sequence[int] = (WIDTH,)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.predict = nn.Linear(width, sum(widths))

    def loss(self, embedding: Tensor, voice: Tensor, known: Tensor) -> Tensor:
        """1 - cosine, mean over teachers and the known rows of embedding [B, D] and voice [B, sum of widths];
        known [B] bool."""
        known = known & voice.any(dim=1)
        if not bool(known.any()):
            return embedding.sum() * 0.0
        told, wanted = (
            torch.split(each, list(self.widths), dim=1) for each in (self.predict(embedding[known]), voice[known])
        )
        likeness = [functional.cosine_similarity(*pair, dim=1).mean() for pair in zip(told, wanted, strict=True)]
        return 1 - torch.stack(likeness).mean()


def speaking_bundle(reference: str) -> tuple[Bundle, SpeakerInfo]:
    """A bundle of the built-in store that tells speakers apart. Raises TeacherError."""
    bundle = teaching_bundle(reference)
    if bundle.manifest.speaker is None:
        raise TeacherError(f"{reference} tells no speakers apart, so it cannot teach voices")
    return bundle, bundle.manifest.speaker


def _jobs(paths: Sequence[Path], speeds: Sequence[float]) -> list[Job]:
    return [(path, speed) for speed in speeds for path in paths]


def _key(paths: Sequence[Path], speeds: Sequence[float]) -> str:
    key = cache_key(paths)
    return key if tuple(speeds) == (1.0,) else "-".join([key, *(f"{speed:g}" for speed in speeds)])


def _embed(jobs: Sequence[Job], kept: Path, python: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    # What is partly done is gone on with, whoever began it.
    listed, partial = kept.with_suffix(f".{os.getpid()}.json"), kept.with_suffix(".partial.npy")
    listed.write_text(json.dumps([(str(path), speed) for path, speed in jobs]), encoding="utf-8")
    script = Path(__file__).with_name("resemblyzer_teacher.py")
    run_beside(python, script, listed, partial, failure=TeacherError)
    listed.unlink()
    if kept.is_file():
        return  # another run was done first
    vectors = np.load(partial)
    if vectors.shape != (len(jobs), WIDTH) or not bool(torch.from_numpy(vectors).isfinite().all()):
        raise TeacherError(f"Resemblyzer gave {vectors.shape}, wanted {len(jobs)} vectors of {WIDTH} numbers")
    partial.replace(kept)
