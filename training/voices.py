"""A speaker teacher: Resemblyzer's embedding of every recording, which the student's learns to predict.

It needs no labels, so speech of people who are not told apart teaches the speaker branch as well. The
vectors are computed once, in the environment that `make peers` makes, and kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.beside import run_beside
from training.errors import TeacherError
from training.files import cache_key

WIDTH = 256

Vector = npt.NDArray[np.float32]


class Voices:
    """Unit vectors of recordings; build with `Voices.build`."""

    def __init__(self, vectors: npt.NDArray[np.float32], paths: Sequence[Path]) -> None:
        self._vectors = vectors
        self._row = {str(path): row for row, path in enumerate(paths)}

    @classmethod
    def build(cls, folder: Path, paths: Sequence[Path], python: Path) -> Voices:
        """Of exactly these recordings, kept in `folder`; some 20 ms for each. Raises TeacherError."""
        kept = folder / f"voices-{cache_key(paths)}.npy"
        if not kept.is_file():
            _embed(paths, kept, python)
        return cls(np.load(kept), paths)

    def of(self, path: Path) -> Vector:
        """The recording's vector [256]; zeros where there is none."""
        row = self._row.get(str(path))
        return np.zeros(WIDTH, dtype=np.float32) if row is None else self._vectors[row]


class VoiceHead(nn.Module):
    """Predicts the teacher's vectors from the student's speaker embedding; not part of the student."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.predict = nn.Linear(width, WIDTH)

    def loss(self, embedding: Tensor, voice: Tensor, known: Tensor) -> Tensor:
        """1 - cosine, mean over the known rows of embedding [B, D] and voice [B, 256]; known [B] bool."""
        known = known & voice.any(dim=1)
        if not bool(known.any()):
            return embedding.sum() * 0.0
        return 1 - functional.cosine_similarity(self.predict(embedding[known]), voice[known], dim=1).mean()


def _embed(paths: Sequence[Path], kept: Path, python: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    listed, partial = kept.with_suffix(".paths.json"), kept.with_suffix(".partial.npy")
    listed.write_text(json.dumps([str(path) for path in paths]), encoding="utf-8")
    script = Path(__file__).with_name("resemblyzer_teacher.py")
    run_beside(python, script, listed, partial, failure=TeacherError)
    vectors = np.load(partial)
    if vectors.shape != (len(paths), WIDTH) or not bool(torch.from_numpy(vectors).isfinite().all()):
        raise TeacherError(f"Resemblyzer gave {vectors.shape}, wanted {len(paths)} vectors of {WIDTH} numbers")
    partial.replace(kept)
    listed.unlink()
