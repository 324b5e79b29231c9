"""RobustDistiller's second task: the student also cleans what it hears (Guimarães et al. 2023).

    M = sigmoid(BiLSTM(student's frames)),   L_enh = mean | M |STFT(heard)| - |STFT(recorded)| |,   L = L_KD + 2 L_enh

The teacher hears the recording, the student the corrupted one. The head is dropped after training. Paper and
released code disagree on what the head reads; `source: last` is the paper's figure, so the gradient reaches
every layer of the student, and `source: cnn` the code's, where it reaches the CNN alone. Both spectra are
divided by the recording's level, lest quiet clips count less.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from training.cuts import Waves

FFT, WINDOW, HOP = 512, 400, 160


class EnhancementRecipe(BaseModel):
    """The paper's head: three bidirectional layers of 256, weight 2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=2.0, gt=0)
    source: Literal["last", "cnn"] = "last"
    hidden: int = Field(default=256, gt=0)
    layers: int = Field(default=3, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class Enhancement(nn.Module):
    """Frames of a student, `hop` samples apart, -> the loss of the magnitudes they mask."""

    def __init__(self, width: int, hop: int, recipe: EnhancementRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self._repeat = hop // HOP
        self.lstm = nn.LSTM(
            width,
            recipe.hidden,
            recipe.layers,
            batch_first=True,
            bidirectional=True,
            dropout=recipe.dropout if recipe.layers > 1 else 0.0,
        )
        self.mask = nn.Linear(2 * recipe.hidden, FFT // 2 + 1)

    def forward(self, frames: Tensor, inside: Tensor, batch: Waves) -> Tensor:
        """Frames [B, T, D], of which those `inside` [B, T] are within their clip; scalar."""
        recorded = batch.as_recorded.waveform
        level = recorded.square().sum(dim=1).div(batch.lengths).sqrt().clamp(min=1e-5)[:, None, None]
        heard, wanted = magnitudes(batch.waveform) / level, magnitudes(recorded) / level
        packed = nn.utils.rnn.pack_padded_sequence(
            frames.float(), inside.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False
        )
        out, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=frames.shape[1])
        mask = torch.sigmoid(self.mask(out)).repeat_interleave(self._repeat, dim=1)
        counted = inside.repeat_interleave(self._repeat, dim=1)
        # The transform's frame k is centred on k hops; a student's frame t covers those after its beginning.
        span = min(mask.shape[1], heard.shape[1] - 1)
        heard, wanted = heard[:, 1 : span + 1], wanted[:, 1 : span + 1]
        distance = functional.l1_loss(mask[:, :span] * heard, wanted, reduction="none").mean(dim=2)
        return (distance * counted[:, :span]).sum() / counted[:, :span].sum().clamp(min=1)


def magnitudes(waveform: Tensor) -> Tensor:
    """[B, N] -> [B, 1 + N // 160, 257]."""
    with torch.autocast(waveform.device.type, enabled=False):
        spectrum = torch.stft(
            waveform.float(),
            FFT,
            HOP,
            WINDOW,
            window=torch.hann_window(WINDOW, device=waveform.device),
            pad_mode="constant",
            return_complex=True,
        )
    return spectrum.abs().transpose(1, 2)
