"""A teacher's layers kept on disk: each recording is judged once, however many epochs the student takes.

What is kept is rounded to half precision, and what was just computed is rounded likewise, so a step sees the
same numbers whether its recordings were in the cache or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.cuts import Waves
from training.teachers import HiddenStates, Teacher

SUFFIX = ".safetensors"
# Counts changes of what a teacher says: what was kept before one is not looked at again.
FORM = 2


class CachedTeacher:
    """The layers `targets` of a teacher, from `folder` where they are there; at most `limit_bytes` are kept.

    Nothing is thrown out: every recording is as likely as any other to be asked for next. A disk that is
    full, or a file that is damaged, costs time, never the run.
    """

    def __init__(self, teacher: Teacher, targets: Sequence[int], folder: Path, limit_bytes: int) -> None:
        self.teacher = teacher
        self._targets = sorted(set(targets))
        self._folder = folder / _digest(teacher, self._targets)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._left = limit_bytes - sum(file.stat().st_size for file in self._folder.glob(f"*{SUFFIX}"))
        self.computed = 0

    def __call__(self, batch: Waves) -> HiddenStates:
        """As the teacher's forward; layers that are no target are empty."""
        files = [self._file(batch, row) for row in range(len(batch.lengths))]
        found = [_read(file) for file in files]
        missing = [row for row, layers in enumerate(found) if layers is None]
        if missing:
            lengths = batch.lengths[missing]
            self.teacher.to(batch.waveform.device)
            states = self.teacher(batch.waveform[missing][:, : int(lengths.max())], lengths)
            self.computed += len(missing)
            for place, row in enumerate(missing):
                inside = states.mask[place]
                layers = torch.stack([states.hidden[target][place][inside] for target in self._targets]).half().cpu()
                found[row] = layers
                self._keep(files[row], layers)
        return self._together([layers for layers in found if layers is not None], batch.waveform.device)

    def _together(self, found: Sequence[Tensor], device: torch.device) -> HiddenStates:
        counts = torch.tensor([layers.shape[1] for layers in found])
        padded = torch.zeros(len(self._targets), len(found), int(counts.max()), found[0].shape[2])
        for row, layers in enumerate(found):
            padded[:, row, : layers.shape[1]] = layers.float()
        padded = padded.to(device)
        empty = padded.new_zeros(0)
        place = {target: index for index, target in enumerate(self._targets)}
        hidden = tuple(padded[place[layer]] if layer in place else empty for layer in range(self.teacher.layers + 1))
        frames = torch.arange(padded.shape[2], device=device)[None, :]
        return HiddenStates(hidden, frames < counts.to(device)[:, None])

    def _file(self, batch: Waves, row: int) -> Path:
        said = f"{batch.names[row]}:{batch.starts[row]}:{int(batch.lengths[row])}"
        return self._folder / (hashlib.sha256(said.encode()).hexdigest()[:32] + SUFFIX)

    def _keep(self, file: Path, layers: Tensor) -> None:
        size = layers.numel() * layers.element_size()
        if size > self._left:
            return
        partial = file.with_suffix(".partial")
        try:
            save_file({"layers": layers.contiguous()}, partial)
            partial.replace(file)
        except (OSError, SafetensorError):
            partial.unlink(missing_ok=True)
            self._left = 0
            return
        self._left -= size


def _read(file: Path) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        return load_file(file)["layers"]
    except (OSError, SafetensorError, KeyError):
        return None


def _digest(teacher: Teacher, targets: Sequence[int]) -> str:
    digest = hashlib.sha256(f"{FORM}:{teacher.family}:{teacher.normalise}:{list(targets)}".encode())
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]
