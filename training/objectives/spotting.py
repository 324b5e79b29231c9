"""Losses for keywords in frames: where the word is known to be, and whether it is in the clip at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Frames this close to a word's edge belong to neither side: annotation is no more exact than that.
EDGE_S = 0.06


def event_log_odds(logits: Tensor, mask: Tensor) -> Tensor:
    """Log odds of each keyword having been said once, against background all along.

    logits [B, T, K] with background at 0, mask [B, T]; returns [B, K] with zeros at index 0.

    Suppose that at most one frame emits a keyword and all others emit background. The path that
    emits k at t is exp(z_tk - z_t0) times as likely as the all-background path, whence

        odds(k) = sum_t exp(z_tk - z_t0).

    This is CTC (Graves et al. 2006) for targets of at most one symbol, without repeats.
    """
    relative = (logits - logits[:, :, :1]).masked_fill(~mask[:, :, None], -1e4)
    odds = torch.logsumexp(relative[:, :, 1:], dim=1)
    return functional.pad(odds, (1, 0))


def clip_loss(logits: Tensor, mask: Tensor, keyword: Tensor, possible: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the clip's label under `event_log_odds`; labels not `possible` are left out."""
    odds = event_log_odds(logits, mask).masked_fill(~possible, -1e4)
    log_p = torch.log_softmax(odds, dim=1)
    hit = log_p.gather(1, keyword[:, None]).squeeze(1)
    spread = (log_p * possible).sum(dim=1) / possible.sum(dim=1)
    return -((1 - smoothing) * hit + smoothing * spread).mean()


def frame_loss(
    logits: Tensor, mask: Tensor, keyword: Tensor, word_s: Tensor, possible: Tensor, frame_hop_s: float
) -> Tensor:
    """Cross-entropy of each frame: the keyword between its start and end, background elsewhere.

    Frame j is centred on j * frame_hop_s. Averaged within words and within background separately, so
    that long silences do not drown words.
    """
    centres = torch.arange(logits.shape[1], device=logits.device) * frame_hop_s
    start, end = word_s[:, :1], word_s[:, 1:]
    spoken = keyword[:, None] > 0
    inside = spoken & (centres >= start + EDGE_S) & (centres <= end - EDGE_S)
    near = spoken & (centres >= start - EDGE_S) & (centres <= end + EDGE_S)
    target = torch.where(inside, keyword[:, None], 0)
    log_p = torch.log_softmax(logits.masked_fill(~possible[:, None, :], -1e4), dim=2)
    loss = -log_p.gather(2, target[:, :, None]).squeeze(2)
    word = (inside & mask).float()
    background = (~near & mask).float()
    return (loss * word).sum() / word.sum().clamp(min=1) + (loss * background).sum() / background.sum().clamp(min=1)
