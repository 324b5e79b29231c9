"""Finished runs as teachers of words: their mean opinion on a clip is a soft target for the student.

Networks that know one group of labels only (one language) judge the clips of that group, each among its own
labels. They hear the corrupted waveform, but none of the student's spectral changes: the student must say
about the worse input what they say about the better one (Xie et al. 2020, noisy student).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.errors import RunError, TeacherError
from training.objectives.spotting import event_log_odds
from training.students.edge import Edge


class Panel:
    """Judges of the same labels. Raises TeacherError where they differ, or know what the student does not."""

    def __init__(
        self, members: Sequence[tuple[Edge, Sequence[str]]], labels: Sequence[str], temperature: float
    ) -> None:
        first = list(members[0][1])
        if any(list(own) != first for _, own in members):
            raise TeacherError("the teachers of one panel must know the same labels")
        unknown = sorted(set(first) - set(labels))
        if unknown:
            raise TeacherError(f"the teachers know labels that the student has not, {unknown[0]} among them")
        self._members = [
            member.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for member, _ in members
        ]
        self._classes = torch.tensor([1 + list(labels).index(label) for label in first])
        self._temperature = temperature

    @classmethod
    def load(cls, runs: Sequence[Path], labels: Sequence[str], temperature: float) -> Panel:
        """Of finished runs. Raises RunError, TeacherError."""
        from training.run import load_student

        members = []
        for folder in runs:
            student, run = load_student(folder)
            if not run["labels"]:
                raise RunError(f"{folder} has no labels")
            members.append((student, run["labels"]))
        return cls(members, labels, temperature)

    def loss(self, logits: Tensor, mask: Tensor, waveform: Tensor, lengths: Tensor, keyword: Tensor) -> Tensor:
        """T^2 times the cross-entropy of the student's clip scores against the panel's (Hinton et al. 2015, eq. 2),
        over the clips whose keyword the panel knows; zero where there is none.

        The student's logits [B, T, K] and mask [B, T]; waveform [B, N], lengths [B], keyword [B] as in a batch.
        """
        rows = torch.isin(keyword, self._classes).nonzero().flatten()
        if len(rows) == 0:
            return logits.sum() * 0.0
        target = self.opinion(waveform[rows], lengths[rows])
        odds = event_log_odds(logits[rows], mask[rows])[:, self._classes] / self._temperature
        return -(target * torch.log_softmax(odds, dim=1)).sum(dim=1).mean() * self._temperature**2

    @torch.no_grad()
    def opinion(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """[B, labels of the panel]: mean of the members' softened probabilities."""
        waveform = waveform[:, : int(lengths.max())]
        found = []
        for member in self._members:
            with torch.autocast("cpu", torch.bfloat16):
                out = member(waveform, lengths)
            odds = event_log_odds(out.keyword_logits, out.mask)[:, 1:]
            found.append(torch.softmax(odds / self._temperature, dim=1))
        return torch.stack(found).mean(dim=0)
