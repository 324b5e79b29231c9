"""A self-supervised trunk with one head for each task (Kerpicci et al. 2023, section 2.2).

The paper leaves pooling open. Keywords are named frame by frame, so that the model can also say when a
word was said; a clip's score is `event_log_odds`. Speakers are told by one of `back_ends.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from training.audio_cache import SAMPLE_RATE_HZ
from training.students.adapters import AdapterRecipe, Adapters
from training.students.back_ends import BackEnd, back_end, statistics
from training.students.edge import EdgeOutputs, unit
from training.teachers import SelfSupervised

# Of the keyword head's first weights.
HEAD_SPREAD = 1e-3


class JointModel(nn.Module):
    """`labels` counts background: K = 1 + number of keywords."""

    def __init__(
        self,
        trunk: SelfSupervised,
        labels: int,
        *,
        speaker_dim: int = 192,
        dropout: float = 0.1,
        speakers_by: BackEnd = "linear",
        adapters: AdapterRecipe | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.speaker_dim = speaker_dim
        self.dropout = nn.Dropout(dropout)
        self.keyword_head = nn.Linear(trunk.width, labels)
        # A word anywhere in a second is at first as likely as none. With torch's own weights the loss begins at 25
        # here, and gradients of that size undo what the trunk has learnt.
        nn.init.normal_(self.keyword_head.weight, std=HEAD_SPREAD)
        nn.init.zeros_(self.keyword_head.bias)
        with torch.no_grad():
            self.keyword_head.bias[0] = math.log(max(1, labels - 1) * SAMPLE_RATE_HZ / trunk.hop)
        self.speaker_head = back_end(speakers_by, trunk.width, trunk.layers, speaker_dim, dropout)
        self.adapters = None if adapters is None else Adapters(trunk, adapters)

    def forward(self, waveform: Tensor, lengths: Tensor) -> EdgeOutputs:
        """Waveform [B, N] in [-1, 1] at 16 kHz, lengths [B] in samples; what lies past a length is ignored."""
        found = self.trunk(waveform, lengths)
        frames = (found.hidden[-1] * found.mask[:, :, None].to(found.hidden[-1].dtype)).float()
        return EdgeOutputs(
            keyword_logits=self.keyword_head(self.dropout(frames)).float(),
            speaker_embedding=unit(self.speaker_head(found.hidden, found.mask).float()),
            embedding=unit(statistics(frames, found.mask)[:, : self.trunk.width]),
            frames=frames,
            mask=found.mask,
        )
