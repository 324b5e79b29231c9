"""A self-supervised trunk with one linear layer for each task (Kerpicci et al. 2023, section 2.2).

The paper leaves pooling open. Keywords are named frame by frame, so that the model can also say when a
word was said; a clip's score is `event_log_odds`. Speakers are told by mean and deviation over time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.students.edge import EdgeOutputs
from training.teachers import SelfSupervised


class JointModel(nn.Module):
    """`labels` counts background: K = 1 + number of keywords."""

    def __init__(self, trunk: SelfSupervised, labels: int, *, speaker_dim: int = 192, dropout: float = 0.1) -> None:
        super().__init__()
        self.trunk = trunk
        self.speaker_dim = speaker_dim
        self.dropout = nn.Dropout(dropout)
        self.keyword_head = nn.Linear(trunk.width, labels)
        self.speaker_head = nn.Linear(2 * trunk.width, speaker_dim)

    def forward(self, waveform: Tensor, lengths: Tensor) -> EdgeOutputs:
        """Waveform [B, N] in [-1, 1] at 16 kHz, lengths [B] in samples; what lies past a length is ignored."""
        found = self.trunk(waveform, lengths)
        inside = found.mask[:, :, None].to(found.hidden[-1].dtype)
        frames = (found.hidden[-1] * inside).float()
        count = found.mask.sum(dim=1, keepdim=True)
        mean = frames.sum(dim=1) / count
        spread = (frames.square().sum(dim=1) / count - mean.square()).clamp(min=1e-5).sqrt()
        speaker = self.speaker_head(self.dropout(torch.cat([mean, spread], dim=1)))
        return EdgeOutputs(
            keyword_logits=self.keyword_head(self.dropout(frames)).float(),
            speaker_embedding=_unit(speaker.float()),
            embedding=_unit(mean),
            frames=frames,
            mask=found.mask,
        )


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=1, keepdim=True) + 1e-12)
