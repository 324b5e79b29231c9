"""Masked prediction of units (Hsu et al. 2021).

    p(c | o_t) = softmax over c of  cos(A o_t, e_c) / 0.1                                   (eq. 3)
    L = a L_hidden + (1 - a) L_visible,  L_m = - mean over frames t of  log p(z_t | o_t)    (eq. 1, 2)

The paper ends with a = 1; in the few steps that a small machine can do the visible frames teach more.
`hidden_weight` is a.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.cuts import Waves
from training.teachers import SelfSupervised
from training.units import Units

TEMPERATURE = 0.1


class MaskedPrediction(nn.Module):
    """The encoder with the projection A and the units' embeddings e of eq. 3, dropped when it is saved."""

    def __init__(
        self,
        trunk: SelfSupervised,
        clusters: int,
        units: Units,
        *,
        span: int,
        share: float,
        hidden_weight: float = 1.0,
    ) -> None:
        super().__init__()
        width = min(256, trunk.width)
        self.trunk = trunk
        self.project = nn.Linear(trunk.width, width)
        # Only its direction counts. Small, so that few steps can turn it: an optimiser's steps are of one
        # size, and rows of length 16 took hundreds of them to point anywhere.
        self.embedding = nn.Parameter(0.05 * torch.randn(clusters, width))
        self._units = units
        self._span, self._share, self._hidden_weight = span, share, hidden_weight

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """Loss and share of hidden frames that are named right."""
        target = self._units(batch.as_recorded)
        counts = [min(self.trunk.frames(int(length)), target.shape[1]) for length in batch.lengths]
        hidden = hide_spans(counts, target.shape[1], span=self._span, share=self._share).to(target.device)
        out = self.trunk(batch.waveform, batch.lengths, hidden).hidden[-1]
        hidden_loss, accuracy = self._name(out[hidden], target[hidden])
        terms = {"total": hidden_loss, "hidden": hidden_loss, "accuracy": accuracy}
        if self._hidden_weight == 1:
            return terms
        inside = torch.arange(target.shape[1])[None, :] < torch.tensor(counts)[:, None]
        visible = inside.to(hidden.device) & ~hidden
        visible_loss, terms["visible-accuracy"] = self._name(out[visible], target[visible])
        terms["total"] = self._hidden_weight * hidden_loss + (1 - self._hidden_weight) * visible_loss
        return terms

    def _name(self, out: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        similarity = functional.linear(
            functional.normalize(self.project(out).float(), dim=1),
            functional.normalize(self.embedding.float(), dim=1),
        )
        loss = functional.cross_entropy(similarity / TEMPERATURE, target)
        return loss, (similarity.argmax(dim=1) == target).float().mean()


def hide_spans(counts: Sequence[int], frames: int, *, span: int, share: float) -> Tensor:
    """[B, frames] bool: spans that start at random, as many as would hide `share` of each clip's frames if they
    never met (fairseq's compute_mask_indices, as HuBERT uses it). Every clip has at least one hidden frame."""
    hidden = torch.zeros(len(counts), frames, dtype=torch.bool)
    for row, count in enumerate(counts):
        length = min(span, max(1, count // 2))
        starts = max(1, int(share * count / length + float(torch.rand(()))))
        for start in torch.randperm(count - length + 1)[:starts].tolist():
            hidden[row, start : start + length] = True
    return hidden
