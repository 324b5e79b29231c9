"""Additive angular margin softmax (Deng et al. 2019, eq. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class AamSoftmax(nn.Module):
    """Unit embeddings [B, D] and speaker classes [B] -> mean cross-entropy.

    Logits are s·cos θ_j, and s·cos(θ_y + m) for the true class; where θ_y + m passes π the usual
    linear continuation cos θ_y - m·sin m keeps the loss monotonic.
    """

    def __init__(self, dim: int, classes: int, scale: float = 30.0, *, weight: Tensor | None = None) -> None:
        """`weight` [classes] is how much each speaker counts."""
        super().__init__()
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", weight, persistent=False)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_normal_(self.weight)

    def forward(self, embedding: Tensor, speaker: Tensor, margin: float) -> Tensor:
        cosine = functional.linear(embedding, functional.normalize(self.weight)).clamp(-1.0, 1.0)
        true = cosine.gather(1, speaker[:, None])
        sine = torch.sqrt((1.0 - true * true).clamp(min=1e-6))
        shifted = true * math.cos(margin) - sine * math.sin(margin)
        shifted = torch.where(true > math.cos(math.pi - margin), shifted, true - margin * math.sin(margin))
        logits = cosine.scatter(1, speaker[:, None], shifted)
        return functional.cross_entropy(logits * self.scale, speaker, weight=self.class_weight)
