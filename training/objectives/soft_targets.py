"""A served bundle as a teacher of keywords (Hinton et al. 2015, "Distilling the knowledge in a neural network").

It hears the waveform that the student hears, noise and all (but not the changes of features, `spectral.py`), and the
student learns its probabilities of what was said in the clip: beside the label, which other words it sounded like. The
bundle's graph is all that is needed, so whoever has the repository has the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model_store import Bundle, LocalStore, StoreError, builtin_store_path
from model_store.graph import part_of
from model_store.inference import open_session
from training.audio_cache import SAMPLE_RATE_HZ
from training.errors import TeacherError
from training.objectives.spotting import event_log_odds
from training.students.edge import FRAME_HOP


class SoftTargets:
    """A bundle of the built-in store, NAME@VERSION, whose keywords are `labels` in any order. Raises TeacherError."""

    def __init__(self, reference: str, labels: Sequence[str], *, threads: int = 1) -> None:
        bundle = teaching_bundle(reference)
        own = [keyword.label for keyword in bundle.manifest.keywords.labels]
        if sorted(own) != sorted(labels):
            raise TeacherError(f"{reference} knows {len(own)} keywords, and the data has {len(labels)} others or more")
        if round(bundle.manifest.keywords.frame_hop_s * SAMPLE_RATE_HZ) != FRAME_HOP:
            raise TeacherError(f"{reference} has frames of {bundle.manifest.keywords.frame_hop_s} s, not the student's")
        self.digest = bundle.digest
        # Background first, in both.
        self._order = torch.tensor([0, *(1 + own.index(label) for label in labels)])
        graph = part_of(bundle.read(bundle.manifest.graph.file), ["keyword_logits"])
        self._session = open_session(graph, threads=threads)

    def __call__(self, waveform: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Log odds [B, K] of each keyword against background; waveform [B, N], lengths [B], mask [B, T]."""
        feeds = {"waveform": waveform.numpy().astype(np.float32, copy=False), "lengths": lengths.numpy()}
        logits = torch.from_numpy(self._session.run(["keyword_logits"], feeds)[0])
        return event_log_odds(logits[:, :, self._order], mask)


def teaching_bundle(reference: str) -> Bundle:
    """Raises TeacherError where the built-in store has no such bundle."""
    try:
        return LocalStore(builtin_store_path()).resolve(reference)
    except StoreError as error:
        raise TeacherError(f"{reference} is not in the built-in store: {error}") from error


def soft_loss(student: Tensor, teacher: Tensor, possible: Tensor, temperature: float) -> Tensor:
    """Divergence of the student's probabilities from the teacher's, both softened, over the labels that are possible;
    log odds [B, K]. The factor keeps gradients as large as without softening (section 2 there)."""
    wanted, given = (
        torch.log_softmax(odds.masked_fill(~possible, -1e4) / temperature, dim=1) for odds in (teacher, student)
    )
    return (wanted.exp() * (wanted - given)).sum(dim=1).mean() * temperature**2
