"""The DistilHuBERT shape: a teacher's own CNN and first layers, trained to predict its later layers.

Chang et al. 2022 (s3prl's distiller); Kerpicci et al. 2023 use the same student for both of their teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from training.errors import TeacherError
from training.teachers import SelfSupervised


def student_of(teacher: SelfSupervised, *, layers: int = 2) -> SelfSupervised:
    """A trainable model with the teacher's CNN, projection, position embedding and first `layers` layers.

    Raises TeacherError when the teacher has fewer layers.
    """
    if not 1 <= layers <= teacher.layers:
        raise TeacherError(f"the teacher has {teacher.layers} layers; a student of {layers} cannot be cut from it")
    config: Any = copy.deepcopy(teacher.model.config)
    config.num_hidden_layers = layers
    # The student must see what the teacher sees, and be all there.
    config.apply_spec_augment = False
    config.layerdrop = 0.0
    model = type(teacher.model)(config)
    dropped = tuple(f"encoder.layers.{index}." for index in range(layers, teacher.layers))
    kept = {name: value for name, value in teacher.model.state_dict().items() if not name.startswith(dropped)}
    model.load_state_dict(kept)
    return SelfSupervised(model, normalise=teacher.normalise)


class PredictionHeads(nn.Module):
    """Student frames [B, T, D] -> one prediction [B, T, D'] for each target layer.

    Linear - GELU - Linear for each, as wide as the teacher.
    """

    def __init__(self, width: int, targets: Sequence[int], teacher_width: int) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))
            for _ in self.targets
        )

    def forward(self, frames: Tensor) -> list[Tensor]:
        return [head(frames) for head in self.heads]
