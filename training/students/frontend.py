"""Log-mel features from the waveform, inside the graph, so training and serving cannot differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

HOP = 200
LOWEST_HZ, HIGHEST_HZ = 40.0, 7600.0
# Mel power below this is inaudible at 16 bits; the logarithm stops there.
FLOOR = 1e-6
# Rough centre and spread of log mel power in speech. Constants, so no statistic over time or batch
# enters, and the zero that convolutions pad with means "fairly quiet".
CENTRE, SPREAD = -5.0, 4.0


class LogMel(nn.Module):
    """Waveform [B, N] in [-1, 1] at 16 kHz -> features [B, mels, ceil(N / hop)]; hops of 200 are 12.5 ms.

    Windows are two hops long, so framing is two views of the waveform. A Hann window is
    symmetric, hence the real part of the transform needs x[n] + x[W-n] only and the imaginary part
    x[n] - x[W-n]: two half-size matrix products in place of one full one. Bins of even and of odd
    number are symmetric about a quarter of the window once more, with either sign: four products of
    a quarter's size, with more operators around them, which many frames are worth (`forward`) and the
    few of a stream's chunk are not (`of_frames`).
    """

    def __init__(self, mels: int = 64, sample_rate_hz: int = 16_000, *, hop: int = HOP) -> None:
        super().__init__()
        self.hop = hop
        filters = mel_filters(mels, hop + 1, sample_rate_hz)
        heard = filters.sum(dim=1) > 0
        n = torch.arange(1, hop + 1, dtype=torch.float64)
        k = torch.arange(hop + 1, dtype=torch.float64)[heard]
        phase = math.pi * torch.outer(n, k) / hop
        window = 0.5 - 0.5 * torch.cos(math.pi * n / hop)
        # n = W/2 is its own mirror image: the fold below counts it twice.
        window[-1] *= 0.5
        self.cosine: Tensor
        self.sine: Tensor
        self.mel: Tensor
        self.near: Tensor
        self.far: Tensor
        self.cosine_even: Tensor
        self.cosine_odd: Tensor
        self.sine_even: Tensor
        self.sine_odd: Tensor
        self.both: Tensor
        self.register_buffer("cosine", (torch.cos(phase) * window[:, None]).float(), persistent=False)
        self.register_buffer("sine", (torch.sin(phase) * window[:, None]).float(), persistent=False)
        self.register_buffer("mel", filters[heard].float(), persistent=False)
        self._fold_again(filters[heard], k)

    def _fold_again(self, filters: Tensor, k: Tensor) -> None:
        hop = self.hop
        if hop % 2:
            raise ValueError(f"hop is {hop}; it must be even")
        n = torch.arange(hop // 2 + 1, dtype=torch.float64)
        near = 0.5 - 0.5 * torch.cos(math.pi * n / hop)
        # Both ends are their own mirror images.
        share = torch.ones_like(n)
        share[[0, -1]] = 0.5
        phase = math.pi * torch.outer(n, k) / hop
        even = k % 2 == 0
        self.register_buffer("near", near.float(), persistent=False)
        self.register_buffer("far", (1 - near).float(), persistent=False)
        for parity, bins in (("even", even), ("odd", ~even)):
            for name, wave in (("cosine", torch.cos(phase)), ("sine", torch.sin(phase))):
                matrix = (wave * share[:, None])[:, bins].float().contiguous()
                self.register_buffer(f"{name}_{parity}", matrix, persistent=False)
        self.register_buffer("both", torch.cat([filters[even], filters[~even]]).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        count, hop = waveform.shape[0], self.hop
        quarter = hop // 2
        padded = functional.pad(waveform, (hop, 2 * hop - 1))
        # One block of a hop for each frame and two more: a frame's window are its own block and the next one.
        padded = padded[:, : padded.shape[1] // hop * hop]
        ahead = padded.reshape(count, -1, hop)[:, :, : quarter + 1]
        back = padded[:, quarter:-quarter].reshape(count, -1, hop)[:, :, : quarter + 1].flip(2)
        # x[n], x[W/2-n], x[W/2+n] and x[W-n], for n from 0 to a quarter of the window W.
        first, second, third, fourth = ahead[:, :-2], back[:, :-1], ahead[:, 1:-1], back[:, 1:]
        even_near, even_far = (first + fourth) * self.near, (second + third) * self.far
        odd_near, odd_far = (first - fourth) * self.near, (second - third) * self.far
        real = torch.matmul(even_near + even_far, self.cosine_even), torch.matmul(even_near - even_far, self.cosine_odd)
        imaginary = torch.matmul(odd_near - odd_far, self.sine_even), torch.matmul(odd_near + odd_far, self.sine_odd)
        squares = [a * a + b * b for a, b in zip(real, imaginary, strict=True)]
        return self._on_mel_scale(torch.cat(squares, dim=2), self.both)

    def of_frames(self, padded: Tensor, frames: int) -> Tensor:
        """Features [B, mels, frames] of samples that begin one hop before the first frame's centre."""
        count, hop = padded.shape[0], self.hop
        ahead = padded[:, 1 : frames * hop + 1].reshape(count, -1, hop)
        behind = padded[:, hop : (frames + 1) * hop].reshape(count, -1, hop).flip(2)
        real = torch.matmul(ahead + behind, self.cosine)
        imaginary = torch.matmul(ahead - behind, self.sine)
        return self._on_mel_scale(real * real + imaginary * imaginary, self.mel)

    def _on_mel_scale(self, squares: Tensor, filters: Tensor) -> Tensor:
        features = (torch.log(torch.matmul(squares, filters) + FLOOR) - CENTRE) / SPREAD
        return features.transpose(1, 2)


def mel_filters(mels: int, bins: int, sample_rate_hz: int) -> Tensor:
    """Triangles of equal height on the HTK mel scale, [bins, mels], float64."""

    ends_hz = torch.tensor([LOWEST_HZ, HIGHEST_HZ], dtype=torch.float64)
    lowest, highest = hz_to_mel(ends_hz).tolist()
    edges_hz = mel_to_hz(torch.linspace(lowest, highest, mels + 2, dtype=torch.float64))
    bin_hz = torch.linspace(0.0, sample_rate_hz / 2, bins, dtype=torch.float64)
    rising = (bin_hz[:, None] - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bin_hz[:, None]) / (edges_hz[2:] - edges_hz[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0)


def hz_to_mel(hz: Tensor) -> Tensor:
    """The HTK mel scale."""
    return 2595.0 * torch.log10(1.0 + hz / 700.0)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of `hz_to_mel`."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
