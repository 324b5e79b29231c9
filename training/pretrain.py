"""Masked prediction of hidden units (Hsu et al. 2021, HuBERT): a teacher of one's own from audio without labels.

First the units are k-means clusters of MFCC frames; then clusters of a middle layer of the model that the
first pass made. Frames are hidden in spans of ten, about half of them, and the model names the unit of each
hidden frame:

    p(c | o_t) = softmax over c of  cos(A o_t, e_c) / 0.1        (eq. 3)
    L = a L_hidden + (1 - a) L_visible,  L_m = - mean over frames t of  log p(z_t | o_t)    (eq. 1, 2)

The paper ends with a = 1. With the few steps that a small machine can do, the visible frames are what
teaches the CNN to hear at all; `hidden_weight` is a.

The result is a folder in the transformers format, which `load_teacher` opens like any public model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from lhotse.features.kaldi.layers import Wav2LogFilterBank, Wav2MFCC
from pydantic import BaseModel, ConfigDict, Field
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache
from training.cuts import CutBatches, Waves, cuts_of
from training.errors import RunError
from training.manifest import CALIBRATION_FOLD, Clip, digest_data, read_data
from training.teachers import SelfSupervised, Teacher, load_teacher
from training.trainer import Job, Schedule, Watched, fit, is_finished

TEMPERATURE = 0.1
HOP, WINDOW = 320, 400
BANDS = 40
CNN = ("model.feature_extractor.", "model.feature_projection.")
CLIPS_FOR_CLUSTERS = 4000
WATCHED_BATCHES = 8


class TeacherShape(BaseModel):
    """The encoder; the defaults are HuBERT Base (94.4 M)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    conv_channels: int = 512
    dropout: float = 0.1
    layer_drop: float = 0.0

    def config(self) -> HubertConfig:
        """A Base model: strides of 320 samples in all, normalisation over time in the first layer only."""
        return HubertConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            conv_dim=(self.conv_channels,) * 7,
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            feat_proj_dropout=self.dropout,
            activation_dropout=0.0,
            layerdrop=self.layer_drop,
            # Spans are drawn here, from the step's own seed.
            mask_time_prob=0.0001,
            mask_feature_prob=0.0,
        )


class UnitsRecipe(BaseModel):
    """One pass: clusters of MFCC where `layer` is 0, else of that layer of the pass before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: int = Field(gt=1)
    layer: int = Field(default=0, ge=0)
    # HuBERT begins every pass anew; with few steps it pays to go on from the pass before.
    begin: Literal["anew", "on"] = "anew"
    schedule: Schedule


class PretrainRecipe(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    data: Path
    corpora: tuple[str, ...] | None = None
    fold: float = Field(default=0.05, ge=0, lt=1)
    seed: int = 0
    shape: TeacherShape = TeacherShape()
    batch_s: float = Field(default=60.0, gt=1)
    longest_s: float = Field(default=8.0, gt=0.5)
    span: int = Field(default=10, gt=0)
    hidden_share: float = Field(default=0.8, gt=0, lt=1)  # of frames, if spans never overlapped
    hidden_weight: float = Field(default=1.0, gt=0, le=1)
    # Not HuBERT's: see `Hearing`.
    hearing: Schedule | None = None
    passes: tuple[UnitsRecipe, ...] = Field(min_length=1)


class Hearing(nn.Module):
    """What the CNN says of a frame gives its spectrum: squared error of 40 log-mel bands, each standardised
    over the clip.

    Hundreds of thousands of steps of masked prediction teach a CNN on raw samples to hear; the thousand that
    two cores have time for do not, while this takes minutes and is then left behind.
    """

    def __init__(self, trunk: SelfSupervised) -> None:
        super().__init__()
        self.trunk = trunk
        self.spectrum = nn.Linear(trunk.width, BANDS)
        with _whole_windows():
            self._bands = Wav2LogFilterBank(
                frame_length=WINDOW / SAMPLE_RATE_HZ, frame_shift=HOP / SAMPLE_RATE_HZ, snip_edges=True,
                num_filters=BANDS,
            )  # fmt: skip

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """The loss over all frames of the batch."""
        waveform = batch.waveform
        if waveform.shape[1] < WINDOW:
            waveform = functional.pad(waveform, (0, WINDOW - waveform.shape[1]))
        with torch.no_grad():
            centred, variance = _centred(self._bands.to(waveform.device)(waveform), batch.lengths)
            wanted = centred / (variance + 1e-3).sqrt()
        found, mask = self.trunk.heard(waveform, batch.lengths)
        loss = functional.mse_loss(self.spectrum(found[mask]).float(), wanted[mask])
        return {"total": loss}


class MaskedPrediction(nn.Module):
    """The encoder with the projection A and the units' embeddings e of eq. 3, dropped when it is saved."""

    def __init__(
        self,
        trunk: SelfSupervised,
        clusters: int,
        units: Units,
        *,
        span: int,
        share: float,
        hidden_weight: float = 1.0,
    ) -> None:
        super().__init__()
        width = min(256, trunk.width)
        self.trunk = trunk
        self.project = nn.Linear(trunk.width, width)
        self.embedding = nn.Parameter(torch.randn(clusters, width))
        self._units = units
        self._span, self._share, self._hidden_weight = span, share, hidden_weight

    def forward(self, batch: Waves, _step: int) -> dict[str, Tensor]:
        """Loss and share of hidden frames that are named right."""
        target = self._units(batch)
        counts = [min(self.trunk.frames(int(length)), target.shape[1]) for length in batch.lengths]
        hidden = hide_spans(counts, target.shape[1], span=self._span, share=self._share).to(target.device)
        out = self.trunk(batch.waveform, batch.lengths, hidden).hidden[-1]
        hidden_loss, accuracy = self._name(out[hidden], target[hidden])
        terms = {"total": hidden_loss, "hidden": hidden_loss, "accuracy": accuracy}
        if self._hidden_weight == 1:
            return terms
        inside = torch.arange(target.shape[1])[None, :] < torch.tensor(counts)[:, None]
        visible = inside.to(hidden.device) & ~hidden
        visible_loss, terms["visible-accuracy"] = self._name(out[visible], target[visible])
        terms["total"] = self._hidden_weight * hidden_loss + (1 - self._hidden_weight) * visible_loss
        return terms

    def _name(self, out: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        similarity = functional.linear(
            functional.normalize(self.project(out).float(), dim=1),
            functional.normalize(self.embedding.float(), dim=1),
        )
        loss = functional.cross_entropy(similarity / TEMPERATURE, target)
        return loss, (similarity.argmax(dim=1) == target).float().mean()


def hide_spans(counts: Sequence[int], frames: int, *, span: int, share: float) -> Tensor:
    """[B, frames] bool: spans that start at random, as many as would hide `share` of each clip's frames if they
    never met (fairseq's compute_mask_indices, as HuBERT uses it). Every clip has at least one hidden frame."""
    hidden = torch.zeros(len(counts), frames, dtype=torch.bool)
    for row, count in enumerate(counts):
        length = min(span, max(1, count // 2))
        starts = max(1, int(share * count / length + float(torch.rand(()))))
        for start in torch.randperm(count - length + 1)[:starts].tolist():
            hidden[row, start : start + length] = True
    return hidden


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
        with _whole_windows():
            self._cepstra = Wav2MFCC(
                frame_length=WINDOW / SAMPLE_RATE_HZ, frame_shift=HOP / SAMPLE_RATE_HZ, snip_edges=True
            )

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        if waveform.shape[1] < WINDOW:
            waveform = functional.pad(waveform, (0, WINDOW - waveform.shape[1]))
        static: Tensor = self._cepstra.to(waveform.device)(waveform)
        static = _centred(static, lengths)[0]
        first = _differences(static)
        return torch.cat([static, first, _differences(first)], dim=2)


@contextmanager
def _whole_windows() -> Iterator[None]:
    """Frames for whole windows only, as the CNN takes them: lhotse warns that it would rather have one for every
    hop. It also makes its filters in a way that NumPy 2 warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting snip_edges=True")
        warnings.filterwarnings("ignore", message="__array_wrap__", category=DeprecationWarning)
        yield


def _centred(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
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


def pretrain(recipe: PretrainRecipe, folder: Path, cache_folder: Path, *, stop_after: int | None = None) -> Path:
    """All passes, each in its own folder below `folder`; returns the folder of the teacher.

    A pass that is finished is not run again. `stop_after` ends the running pass at that step. Raises TrainingError.
    """
    data = read_data(recipe.data, calibration_fraction=recipe.fold, seed=recipe.seed)
    clips = [clip for clip in data.clips if recipe.corpora is None or clip.corpus in recipe.corpora]
    train = [clip for clip in clips if clip.split == "train"]
    fold = [clip for clip in clips if clip.split == CALIBRATION_FOLD]
    cache = AudioCache.build(cache_folder, [clip.path for clip in (*train, *fold)])
    source = _batches(recipe, train, cache)
    watched = _batches(recipe, fold, cache) if fold else None
    identity = {"recipe": recipe.model_dump(mode="json", exclude={"data"}), "data": digest_data(data)}

    def run(stage: nn.Module, schedule: Schedule, seed: int, own: Path) -> bool:
        """Whether the stage is finished."""
        job = Job(
            stage=stage,
            source=source,
            schedule=schedule,
            seed=seed,
            folder=own,
            identity={**identity, "stage": own.name},
            watch=None if watched is None else partial(_look, batches=watched),
        )
        fit(job, stop_after=stop_after)
        return is_finished(own)

    start: dict[str, Tensor] = {}
    if recipe.hearing is not None:
        torch.manual_seed(recipe.seed)
        trunk = SelfSupervised(HubertModel(recipe.shape.config()), normalise=False)
        if not run(Hearing(trunk), recipe.hearing, recipe.seed, folder / "hearing"):
            return folder / "hearing"
        start = {name: value for name, value in trunk.state_dict().items() if name.startswith(CNN)}
    teacher: Teacher | None = None
    for number, units_recipe in enumerate(recipe.passes, start=1):
        own = folder / f"pass-{number}"
        units = Units(_centres(units_recipe, recipe, train, cache, teacher, own), teacher, units_recipe.layer)
        torch.manual_seed(recipe.seed + number)
        trunk = SelfSupervised(HubertModel(recipe.shape.config()), normalise=False)
        trunk.load_state_dict(start, strict=False)
        if units_recipe.begin == "on" and teacher is not None:
            trunk.load_state_dict(teacher.state_dict())
        stage = MaskedPrediction(
            trunk,
            units_recipe.clusters,
            units,
            span=recipe.span,
            share=recipe.hidden_share,
            hidden_weight=recipe.hidden_weight,
        )
        if not run(stage, units_recipe.schedule, recipe.seed + number, own):
            return own
        save_teacher(trunk, own / "model")
        teacher = load_teacher(str(own / "model"))
    return folder / f"pass-{len(recipe.passes)}" / "model"


def save_teacher(trunk: SelfSupervised, folder: Path) -> None:
    """In the transformers format, with the preprocessor's file that says how input is normalised."""
    trunk.model.save_pretrained(folder)
    extractor: Any = Wav2Vec2FeatureExtractor
    extractor(do_normalize=trunk.normalise, sampling_rate=SAMPLE_RATE_HZ).save_pretrained(folder)


def _batches(recipe: PretrainRecipe, clips: Sequence[Clip], cache: AudioCache) -> CutBatches:
    return CutBatches(
        cuts_of(clips, cache), cache, batch_s=recipe.batch_s, longest_s=recipe.longest_s, seed=recipe.seed
    )


def _centres(
    units: UnitsRecipe,
    recipe: PretrainRecipe,
    clips: Sequence[Clip],
    cache: AudioCache,
    teacher: Teacher | None,
    folder: Path,
) -> npt.NDArray[np.float32]:
    """k-means of the pass, made once and kept beside its checkpoints. Raises RunError."""
    path = folder / "units.npz"
    if path.is_file():
        with np.load(path) as kept:
            return np.asarray(kept["centres"], dtype=np.float32)
    if units.layer and teacher is None:
        raise RunError("the first pass has no model before it whose layer could be clustered; set its layer to 0")
    chosen = list(clips)[:: max(1, len(clips) // CLIPS_FOR_CLUSTERS)]
    batches = _batches(recipe, chosen, cache)
    extractor = Units(np.zeros((1, 1), dtype=np.float32), teacher, units.layer)
    rows, seconds = [], 0.0
    number = 0
    while seconds < batches.seconds * 0.95:
        batch = batches[number]
        features = extractor.features(batch)
        for row, length in enumerate(batch.lengths.tolist()):
            rows.append(features[row, : max(1, (length - WINDOW) // HOP + 1)].numpy())
        seconds += float(batch.lengths.sum()) / SAMPLE_RATE_HZ
        number += 1
    frames = np.concatenate(rows)
    means = MiniBatchKMeans(
        units.clusters, batch_size=10_000, n_init=3, max_iter=100, random_state=recipe.seed, reassignment_ratio=0.0
    )
    means.fit(frames)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "units.partial.npz"
    np.savez(unfinished, centres=means.cluster_centers_.astype(np.float32))
    unfinished.replace(path)
    used = len(np.unique(means.predict(frames[:: max(1, len(frames) // 50_000)])))
    report = {"frames": len(frames), "clusters": units.clusters, "used": used, "layer": units.layer}
    (folder / "units.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return np.asarray(means.cluster_centers_, dtype=np.float32)


@torch.no_grad()
def _look(stage: nn.Module, batches: CutBatches) -> Watched:
    """The losses on the fold's first batches, always with the same hidden spans."""
    stage.eval()
    sums: dict[str, float] = {}
    for number in range(WATCHED_BATCHES):
        torch.manual_seed(number)
        device = next(stage.parameters()).device
        batch = batches[number]
        terms = stage(Waves(batch.waveform.to(device), batch.lengths.to(device)), 0)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) / WATCHED_BATCHES
    return Watched(-sums.get("hidden", sums["total"]), sums)
