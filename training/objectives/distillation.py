"""Layer-wise distillation (Chang et al. 2022, eq. 1; Kerpicci et al. 2023, eq. 1).

    L = sum over target layers p of  mean over frames i of  (1/K) |f_pi - f^_pi|_1 - log sigmoid(cos(f_pi, f^_pi))

The papers sum over frames; the mean differs by a factor of the clip's length and keeps the learning rate
independent of how long the crops are (as s3prl's code does).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def layer_loss(predicted: Tensor, target: Tensor, mask: Tensor, cosine_weight: float = 1.0) -> Tensor:
    """Frames [B, T, K] against the teacher's, mask [B, T] bool; scalar. Identical frames cost 0.3133."""
    distance = (predicted - target).abs().mean(dim=2)
    cosine = functional.cosine_similarity(predicted, target, dim=2)
    cost = distance - cosine_weight * functional.logsigmoid(cosine)
    return (cost * mask).sum() / mask.sum().clamp(min=1)


def distillation_loss(
    predictions: Sequence[Tensor], hidden: Sequence[Tensor], targets: Sequence[int], mask: Tensor
) -> Tensor:
    """Sum over the target layers; `hidden[p]` is the output of the teacher's layer p (0 is its input)."""
    losses = [layer_loss(one, hidden[layer], mask) for one, layer in zip(predictions, targets, strict=True)]
    return torch.stack(losses).sum()
