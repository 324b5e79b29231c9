"""Thin students of STaR (Jang et al. 2024): as deep as the teacher, narrower, nothing copied.

The published counts come out exactly when the CNN's last channels are the encoder's input as they are,
without the linear layer that transformers puts between; `OwnHubert` is HuBERT without it, and what
`load_teacher` opens where a folder's config says so.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from transformers import HubertConfig

from training.errors import TeacherError
from training.teachers import OwnHubert, SelfSupervised, Teacher

POSITION_GROUPS = 16


class ThinShape(BaseModel):
    """The defaults are STaRHuBERT (22.31 M): width 432, feed-forward 976.

    `cnn` lists (channels, kernel, stride) of each convolution. The strides' product is the frame's hop, which
    must be the teacher's: relations between frames are compared pair by pair.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(default=432, gt=0)
    feed_forward: int = Field(default=976, gt=0)
    heads: int = Field(default=12, gt=0)
    layers: int = Field(default=12, gt=0)
    cnn: tuple[tuple[int, int, int], ...] = Field(
        default=((128, 10, 5), (256, 1, 1), *((256, 3, 2),) * 4, (432, 1, 1), *((432, 2, 2),) * 2), min_length=1
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)
    # As a teacher of our own may have them (`pretrain.TeacherShape`). With bands only the strides and kernels of
    # `cnn` count, which say where frames are.
    mel: bool = False
    pre_norm: bool = False

    def config(self) -> HubertConfig:
        """Raises TeacherError where the numbers do not fit together."""
        if self.cnn[-1][0] != self.hidden_size and not self.mel:
            raise TeacherError(f"the CNN ends with {self.cnn[-1][0]} channels; the encoder is {self.hidden_size} wide")
        if self.hidden_size % self.heads or self.hidden_size % POSITION_GROUPS:
            raise TeacherError(
                f"the width {self.hidden_size} is no multiple of {self.heads} heads and of {POSITION_GROUPS}"
            )
        channels, kernels, strides = zip(*self.cnn, strict=True)
        if self.mel:
            channels = (self.hidden_size,) * len(channels)
        config = HubertConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            conv_dim=channels,
            conv_kernel=kernels,
            conv_stride=strides,
            num_conv_pos_embedding_groups=POSITION_GROUPS,
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            feat_proj_dropout=self.dropout,
            activation_dropout=0.0,
            layerdrop=0.0,
            do_stable_layer_norm=self.pre_norm,
            # No frame is ever hidden from the student, so it needs no stand-in.
            mask_time_prob=0.0,
            mask_feature_prob=0.0,
        )
        config.update({"thin": True, "mel": self.mel})
        return config


def _published(width: int, feed_forward: int, heads: int) -> ThinShape:
    cnn = ((128, 10, 5), (256, 1, 1), *((256, 3, 2),) * 4, (width, 1, 1), *((width, 2, 2),) * 2)
    return ThinShape(hidden_size=width, feed_forward=feed_forward, heads=heads, cnn=cnn)


# Width and feed-forward of `star` were read in a re-implementation, those of `star-l` follow from ARMHuBERT;
# of the two small ones only the totals are known (14.1 M and 9.39 M), which these match to 0.1 %.
PUBLISHED = {
    "star": ThinShape(),
    "star-l": _published(480, 1024, 12),
    "star-s": _published(336, 790, 12),
    "star-xs": _published(272, 616, 8),
}


def thin_student(shape: ThinShape, teacher: Teacher) -> SelfSupervised:
    """Untrained. Raises TeacherError where its frames are not the teacher's."""
    student = SelfSupervised(OwnHubert(shape.config()), normalise=teacher.normalise)
    if (student.hop, student.reach) != (teacher.hop, teacher.reach):
        raise TeacherError(
            f"the student's frames are {student.reach} samples long and {student.hop} apart, the teacher's "
            f"{teacher.reach} and {teacher.hop}; relations between frames need the same ones"
        )
    return student
