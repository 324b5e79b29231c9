"""Targets of masked prediction: clusters of MFCC frames, or of a model's frames (Hsu et al. 2021, section II-A)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from lhotse.features.kaldi.layers import Wav2MFCC
from torch import Tensor, nn
from torch.nn import functional

from training.audio_cache import SAMPLE_RATE_HZ
from training.cuts import Waves
from training.teachers import Teacher

HOP, WINDOW = 320, 400


class Units:
    """Cluster numbers of frames: nearest of `centres` [C, D] to MFCC or to a teacher's layer."""

    def __init__(self, centres: npt.NDArray[np.float32], teacher: Teacher | None = None, layer: int = 0) -> None:
        self._centres = torch.from_numpy(np.asarray(centres, dtype=np.float32))
        self._teacher = teacher
        self._layer = layer
        self._mfcc = Mfcc()

    @torch.no_grad()
    def __call__(self, batch: Waves) -> Tensor:
        """[B, T] int64."""
        features = self.features(batch)
        centres = self._centres.to(features.device)
        distance: Tensor = centres.square().sum(dim=1) - 2 * features @ centres.T
        return distance.argmin(dim=2)

    @torch.no_grad()
    def features(self, batch: Waves) -> Tensor:
        """[B, T, D]; the frames of the model that will predict them."""
        if self._teacher is None:
            found: Tensor = self._mfcc(batch.waveform, batch.lengths)
            return found
        self._teacher.to(batch.waveform.device)
        heard: Tensor = self._teacher(batch.waveform, batch.lengths).hidden[self._layer]
        return heard.float()


class Mfcc(nn.Module):
    """13 coefficients with first and second differences, one frame of 25 ms every 20 ms: the CNN's frames.

    HuBERT's are 10 ms apart and every second one is used. [B, N] -> [B, T, 39].
    """

    def __init__(self) -> None:
        super().__init__()
        with whole_windows():
            self._cepstra = Wav2MFCC(
                frame_length=WINDOW / SAMPLE_RATE_HZ, frame_shift=HOP / SAMPLE_RATE_HZ, snip_edges=True
            )

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        if waveform.shape[1] < WINDOW:
            waveform = functional.pad(waveform, (0, WINDOW - waveform.shape[1]))
        static: Tensor = self._cepstra.to(waveform.device)(waveform)
        static = centred(static, lengths)[0]
        first = _differences(static)
        return torch.cat([static, first, _differences(first)], dim=2)


@contextmanager
def whole_windows() -> Iterator[None]:
    """Frames for whole windows only, as the CNN takes them: lhotse warns that it would rather have one for every
    hop. It also makes its filters in a way that NumPy 2 warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting snip_edges=True")
        warnings.filterwarnings("ignore", message="__array_wrap__", category=DeprecationWarning)
        yield


def centred(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each coefficient with mean 0 over the clip, and its variance there. [B, T, D] -> the same, [B, 1, D].

    Else clusters would be mostly levels and microphones, which the CNN's first norm hides from the model
    and which differ more between our corpora than between LibriSpeech's books.
    """
    counts = ((lengths - WINDOW) // HOP + 1).clamp(min=1).to(features.device)
    inside = (torch.arange(features.shape[1], device=features.device)[None, :] < counts[:, None])[:, :, None]
    counts = counts[:, None, None]
    mean = (features * inside).sum(dim=1, keepdim=True) / counts
    centred = (features - mean) * inside
    return centred, centred.square().sum(dim=1, keepdim=True) / counts


def _differences(x: Tensor) -> Tensor:
    """Slope of a line through five frames, the usual regression; edges repeat. [B, T, D] -> the same."""
    padded = torch.cat([x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]], dim=1)
    count = x.shape[1]
    near = padded[:, 3 : 3 + count] - padded[:, 1 : 1 + count]
    far = padded[:, 4 : 4 + count] - padded[:, 0:count]
    return (near + 2 * far) / 10
