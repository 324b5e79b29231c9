"""Large self-supervised models as frozen teachers: wav2vec 2.0, HuBERT and WavLM through transformers.

One door for public weights by hub name, for a local folder, and for a teacher of our own: all come in the
transformers format. What may differ between them, and silently ruins a distillation, is checked here: the
input's normalisation, weights that are missing from the file, and the effect of padding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    HubertConfig,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMModel,
)

from training.audio_cache import SAMPLE_RATE_HZ
from training.errors import TeacherError
from training.students.frontend import LogMel

FAMILIES: dict[str, type[PreTrainedModel]] = {"wav2vec2": Wav2Vec2Model, "hubert": HubertModel, "wavlm": WavLMModel}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
# Stands in for masked frames in pre-training only; some public files leave it out.
UNUSED_WEIGHTS = ("masked_spec_embed",)
# transformers' own constant (Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm).
VARIANCE_FLOOR = 1e-7


class MelFrontEnd(nn.Module):
    """In place of the CNN on samples: 64 log-mel bands each 10 ms, then two convolutions (MelHuBERT, Lin et al. 2023).

    A CNN on samples needs tens of thousands of steps to find out about frequency; bands are given. Each band
    has mean 0 over its clip, which hides the microphone as the CNN's first norm hides the level. Frames are as
    many and as far apart as the CNN's, so everything else stays HuBERT. [B, N] -> [B, C, T].
    """

    MELS, HOP = 64, 160
    lengths: Tensor | None = None  # [B], samples

    def __init__(self, channels: int, reach: int, hop: int) -> None:
        super().__init__()
        self._reach, self._hop = reach, hop
        self.restore()
        self.first = nn.Conv1d(self.MELS, channels, 3, padding=1)
        self.second = nn.Conv1d(channels, channels, 4, stride=hop // self.HOP)

    def restore(self) -> None:
        """Make the filters, which no file holds: transformers builds a model it loads without any data."""
        with torch.device("cpu"):
            self.features = LogMel(self.MELS, hop=self.HOP)

    def forward(self, waveform: Tensor) -> Tensor:
        frames = (waveform.shape[1] - self._reach) // self._hop + 1
        with torch.autocast(waveform.device.type, enabled=False):
            # Silence past the end, so that no clip's last frames see where a batch ends.
            bands = self.features(functional.pad(waveform.float(), (0, 8 * self.HOP)))
            if self.lengths is not None:
                counts = times(self.lengths, self.HOP)
                inside = within(bands.shape[2], counts)[:, None]
                bands = (bands - (bands * inside).sum(dim=2, keepdim=True) / counts[:, None, None]) * inside
        return functional.gelu(self.second(functional.gelu(self.first(bands))))[:, :, :frames]


class OwnHubert(HubertModel):  # type: ignore[no-untyped-call]  # transformers' own hook for subclasses
    """HuBERT with what config.json of our own models may say beside: `"thin": true`, the CNN is as wide as the
    encoder and nothing lies between them (`students/thin.py`); `"mel": true`, a `MelFrontEnd` is its CNN."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        if getattr(config, "thin", False):
            projection: Any = self.feature_projection
            projection.projection = nn.Identity()
        if getattr(config, "mel", False):
            own: Any = self
            own.feature_extractor = MelFrontEnd(
                config.conv_dim[-1], reach(config.conv_kernel, config.conv_stride), math.prod(config.conv_stride)
            )


def times(samples: Tensor, stride: int) -> Tensor:
    """How often the stride fits, for integers from 0. Rounding down, for any sign, is ten operators in a graph."""
    return samples.div(stride, rounding_mode="trunc")


def within(length: int, counts: Tensor, **_: object) -> Tensor:
    """Which of `length` frames (or samples) are within each clip's `counts` [B]: [B, length], bool."""
    return torch.arange(length, device=counts.device)[None, :] < counts[:, None]


def reach(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples under one frame of such a stack of convolutions."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """B clips, T frames, D channels, H heads. Values past a clip's frames mean nothing."""

    # layers + 1 of [B, T, D]; first the encoder's input, then each layer's output, the last one normed
    hidden: tuple[Tensor, ...]
    mask: Tensor  # [B, T] bool, True within the clip
    attention: tuple[Tensor, ...] = ()  # each layer's [B, H, T, T] after the softmax, where it was asked for


class ClipGroupNorm(nn.GroupNorm):
    """The base models' first norm, each channel over time, with each clip's own frames only.

    transformers' counts padding in, so a clip's frames depend on what it was batched with;
    alone, both give the same.
    """

    lengths: Tensor | None = None  # [B], frames of the first convolution

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> the same."""
        if self.lengths is None:
            return super().forward(x)
        if x.device.type == "cpu" and not torch.onnx.is_in_onnx_export():
            # Clip by clip with the fused kernel: a third of the time of what follows. A graph cannot loop, and
            # a GPU would wait for the lengths.
            lengths = self.lengths.tolist()
            rows = [super(ClipGroupNorm, self).forward(row[None, :, :n]) for row, n in zip(x, lengths, strict=True)]
            return torch.cat([functional.pad(row, (0, x.shape[2] - row.shape[2])) for row in rows])
        inside = within(x.shape[2], self.lengths)[:, None]
        wide = x.float() * inside
        count = inside.sum(dim=2, keepdim=True)
        mean = wide.sum(dim=2, keepdim=True) / count
        variance = ((wide - mean) * inside).square().sum(dim=2, keepdim=True) / count
        out = (wide - mean) / torch.sqrt(variance + self.eps) * self.weight[None, :, None] + self.bias[None, :, None]
        return out.to(x.dtype)


class SelfSupervised(nn.Module):
    """A model of one of the families with its input normalisation: waveforms in, every layer's frames out."""

    def __init__(self, model: PreTrainedModel, *, normalise: bool) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        config: Any = model.config
        self.family: str = config.model_type
        self.layers: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self._kernels: tuple[int, ...] = tuple(config.conv_kernel)
        self._strides: tuple[int, ...] = tuple(config.conv_stride)
        self.hop = math.prod(self._strides)
        self._attention = False
        _mask_first_norm(model)
        # transformers would count the frames again from a mask over samples, which in a graph is most of what a short
        # clip's mask costs. It is given the counts.
        own: Any = model
        own._get_feature_vector_attention_mask = within
        if getattr(own, "adapter", None) is not None:
            # wav2vec 2.0's, which makes frames longer for translation.
            own.adapter = None
            config.add_adapter = False

    def keep_attention(self) -> None:
        """From now on forward also returns every layer's attention, which the fused kernels do not give."""
        self.model.set_attn_implementation("eager")
        self._attention = True

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Meanwhile attention is written out: in a graph the fused kernel becomes that and a search for what is no
        number, once a layer."""
        config: Any = self.model.config
        before = config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    @property
    def reach(self) -> int:
        """Samples under one frame."""
        return reach(self._kernels, self._strides)

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples; clips shorter than `reach` are padded to one frame."""
        return max(samples - self.reach, 0) // self.hop + 1

    def centres(self, frames: int) -> Tensor:
        """The sample at the middle of each frame, [frames] float."""
        return torch.arange(frames) * float(self.hop) + self.reach / 2

    def forward(self, waveform: Tensor, lengths: Tensor, hidden_mask: Tensor | None = None) -> HiddenStates:
        """Waveform [B, N] in [-1, 1] at 16 kHz, lengths [B] in samples; each clip's frames are those it gives alone.

        `hidden_mask` [B, T] bool: these frames of the encoder's input are replaced by the model's learned
        stand-in (masked prediction).
        """
        waveform, counts = self._ready(waveform, lengths)
        with warnings.catch_warnings():
            # WavLM's code hands torch a float and a boolean mask together; torch only says so.
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            found = self.model(
                waveform,
                attention_mask=counts,
                mask_time_indices=hidden_mask,
                output_hidden_states=True,
                output_attentions=self._attention,
                return_dict=True,
            )
        hidden = tuple(found.hidden_states)
        if self.model.config.do_stable_layer_norm:
            # Norms come first, so one more stands behind the last layer; transformers 5 lists what comes before it.
            hidden = (*hidden[:-1], found.last_hidden_state)
        mask = within(hidden[0].shape[1], counts)
        return HiddenStates(hidden, mask, tuple(found.attentions) if self._attention else ())

    def heard(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the CNN alone says: frames [B, T, D] as the encoder takes them, and which of them are in the clip."""
        waveform, counts = self._ready(waveform, lengths)
        model: Any = self.model
        found = model.feature_projection(model.feature_extractor(waveform).transpose(1, 2))
        frames: Tensor = found[0] if isinstance(found, tuple) else found
        return frames, within(frames.shape[1], counts)

    def _ready(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(samples as the model wants them, frames of each clip, at least one)."""
        if waveform.shape[1] < self.reach:
            waveform = nn.functional.pad(waveform, (0, self.reach - waveform.shape[1]))
        inside = within(waveform.shape[1], lengths)
        if self.normalise:
            waveform = _zero_mean_unit_variance(waveform, lengths, inside)
        waveform = waveform * inside
        # Clips too short for a frame have one all the same; the attention must not be empty.
        lengths = lengths.clamp(min=self.reach)
        norm = getattr(_first_layer(self.model), "layer_norm", None)
        if isinstance(norm, ClipGroupNorm):
            norm.lengths = times(lengths - self._kernels[0], self._strides[0]) + 1
        encoder: Any = self.model.feature_extractor
        if isinstance(encoder, MelFrontEnd):
            encoder.lengths = lengths
        return waveform, times(lengths - self.reach, self.hop) + 1


class Teacher(SelfSupervised):
    """Frozen: always in evaluation mode, never with gradients."""

    def __init__(self, model: PreTrainedModel, *, normalise: bool) -> None:
        super().__init__(model, normalise=normalise)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002  nn.Module gives it
        """Stays in evaluation mode: dropout and layer drop would blur the targets."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor, hidden_mask: Tensor | None = None) -> HiddenStates:
        """As SelfSupervised, without a graph behind the outputs."""
        return super().forward(waveform, lengths, hidden_mask)


def load_teacher(source: str) -> Teacher:
    """A teacher from a local folder or by its name on the Hugging Face hub.

    Raises TeacherError, saying what to do, for: nothing there, no network, another architecture, weights
    missing from the file, no preprocessor_config.json, another sampling rate.
    """
    folder = Path(source)
    local = folder.exists() or source.startswith((".", "/", "~"))
    if local:
        _check_folder(folder, source)
    config = _config(source, local=local)
    try:
        preprocessor = Wav2Vec2FeatureExtractor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{source} has no readable preprocessor_config.json, which says whether the input is normalised; "
            'copy it from the original model, or write one: {"do_normalize": true, "sampling_rate": 16000}'
        ) from error
    if preprocessor.sampling_rate != SAMPLE_RATE_HZ:
        raise TeacherError(f"{source} wants {preprocessor.sampling_rate} Hz; sotto works at {SAMPLE_RATE_HZ} Hz")
    try:
        # Its annotation leaves the pair out that `output_loading_info` brings.
        load: Any = model_class(config).from_pretrained
        # Files in half precision exist; what is computed here is in 32 bits unless a recipe says otherwise.
        model, report = load(source, config=config, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"the weights of {source} do not load: {_first_line(error)}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(UNUSED_WEIGHTS))
    if missing:
        raise TeacherError(
            f"{len(missing)} weights are missing from {source}, {missing[0]} among them; "
            "the file is incomplete or of another model"
        )
    if isinstance(model.feature_extractor, MelFrontEnd):
        model.feature_extractor.restore()
    return Teacher(model, normalise=bool(preprocessor.do_normalize))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that such a config belongs to."""
    own: type[PreTrainedModel] = OwnHubert
    is_own = getattr(config, "thin", False) or getattr(config, "mel", False)
    return own if is_own else FAMILIES[config.model_type]


def require_hop(teacher: Teacher, hop: int, *, student: str) -> None:
    """Raises TeacherError unless the teacher's frames are `hop` samples apart, as the student's are."""
    if teacher.hop != hop:
        raise TeacherError(
            f"the teacher gives a frame each {teacher.hop} samples and {student} one each {hop}; frames can be "
            "compared one by one only at equal rates: choose another teacher or student, or interpolate"
        )


def at_centres(hidden: Tensor, teacher: Teacher, centres: Tensor) -> Tensor:
    """Teacher frames [B, T, D] at other times: linear interpolation at `centres` [S], in samples, -> [B, S, D].

    Before the first and after the last frame the nearest one counts.
    """
    position = ((centres.to(hidden.device) - teacher.reach / 2) / teacher.hop).clamp(0, hidden.shape[1] - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=hidden.shape[1] - 1)
    share = (position - below).to(hidden.dtype)[None, :, None]
    return hidden[:, below] * (1 - share) + hidden[:, above] * share


def _check_folder(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise TeacherError(f"there is no folder {source}; give a folder in the transformers format or a hub name")
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{source} has no config.json; it is no model in the transformers format")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise TeacherError(f"{source} has no weights; expected is one of {', '.join(WEIGHT_FILES)}")


def _config(source: str, *, local: bool) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        if local:
            raise TeacherError(f"{source}/config.json does not load: {_first_line(error)}") from error
        raise TeacherError(
            f"{source} could not be fetched from the hub: {_first_line(error)} "
            "Without network, download it elsewhere and give the folder."
        ) from error
    if config.model_type not in FAMILIES:
        raise TeacherError(f"{source} is a {config.model_type!r} model; teachers are {', '.join(FAMILIES)}")
    return config


def _first_layer(model: PreTrainedModel) -> Any:
    """Of the CNN; None where a model has bands instead."""
    encoder: Any = model.feature_extractor
    return None if isinstance(encoder, MelFrontEnd) else encoder.conv_layers[0]


def _mask_first_norm(model: PreTrainedModel) -> None:
    """Put a ClipGroupNorm, same weights and names, where the model has a GroupNorm."""
    first = _first_layer(model)
    found: nn.Module | None = getattr(first, "layer_norm", None)
    if isinstance(found, nn.GroupNorm) and not isinstance(found, ClipGroupNorm):
        masked = ClipGroupNorm(found.num_groups, found.num_channels, found.eps)
        masked.load_state_dict(found.state_dict())
        first.layer_norm = masked


def _zero_mean_unit_variance(waveform: Tensor, lengths: Tensor, inside: Tensor) -> Tensor:
    count = lengths[:, None]
    mean = (waveform * inside).sum(dim=1, keepdim=True) / count
    variance = ((waveform - mean) * inside).square().sum(dim=1, keepdim=True) / count
    return (waveform - mean) / torch.sqrt(variance + VARIANCE_FLOOR)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
