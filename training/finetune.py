"""Joint fine-tuning for keywords and speakers (Kerpicci et al. 2023, section 2.2).

One optimiser; steps alternate strictly: a batch of keywords updates everything by cross-entropy, then a
batch of speakers updates everything by the angular margin loss. `mode: frozen` trains the heads only;
`tasks` with one entry is a single-task run. `init` is any model in the transformers format: the teacher
itself (the full-size reference), a distilled student, or, with `layers`, a student cut out of the teacher
and not distilled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache
from training.augment import AugmentRecipe
from training.batches import NO_SPEAKER, Batch, BatchSource, SamplingRecipe
from training.errors import RunError, TeacherError
from training.evaluation.statistics import equal_error_rate
from training.manifest import Clip, Data, digest_data, labels_of
from training.objectives.speaker import AamSoftmax
from training.objectives.spotting import clip_loss, event_log_odds, frame_loss
from training.pretrain import save_teacher
from training.recipe import CorpusRecipe
from training.students.distil import student_of
from training.students.edge import EdgeOutputs
from training.students.joint import JointModel
from training.teachers import SelfSupervised, load_teacher
from training.trainer import Job, Schedule, Watched, fit, is_finished

Task = Literal["keywords", "speakers"]
HEADS, DESCRIPTION = "heads.safetensors", "joint.json"
LONGEST_WATCHED_S = 4.0
WATCHED_CLIPS = 600
CHUNK = 32


class FinetuneRecipe(CorpusRecipe):
    """The whole file."""

    fold: float = Field(default=0.1, ge=0, lt=1)
    init: str = ""
    layers: int = Field(default=0, ge=0)  # 0 keeps them all
    mode: Literal["full", "frozen"] = "full"
    tasks: tuple[Task, ...] = ("keywords", "speakers")
    speaker_dim: int = Field(default=192, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    margin: float = Field(default=0.2, ge=0)
    scale: float = Field(default=30.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # Weight of the loss that says where in the clip the word is; 0 is the paper's.
    frame: float = Field(default=0.5, ge=0)
    # Of the schedule's rate for the trunk; the heads begin from nothing and take the whole.
    trunk_rate: float = Field(default=1.0, ge=0, le=1)
    sampling: SamplingRecipe = SamplingRecipe(crop_s=1.5)
    augment: AugmentRecipe = AugmentRecipe()
    schedule: Schedule


class JointFinetuning(nn.Module):
    """Losses of the task whose turn it is."""

    def __init__(self, model: JointModel, speakers: int, recipe: FinetuneRecipe) -> None:
        super().__init__()
        self.model = model
        self.angular = AamSoftmax(model.speaker_dim, max(1, speakers), recipe.scale)
        self._recipe = recipe

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        recipe = self._recipe
        if recipe.mode == "frozen":
            self.model.trunk.eval()
        out: EdgeOutputs = self.model(batch.waveform, batch.lengths)
        if recipe.tasks[step % len(recipe.tasks)] == "speakers":
            known = batch.speaker != NO_SPEAKER
            loss = self.angular(out.speaker_embedding[known], batch.speaker[known], recipe.margin)
            return {"total": loss, "speakers": loss}
        clip = clip_loss(out.keyword_logits, out.mask, batch.keyword, batch.possible, recipe.label_smoothing)
        if not recipe.frame:
            return {"total": clip, "keywords": clip}
        hop_s = self.model.trunk.hop / SAMPLE_RATE_HZ
        frame = frame_loss(out.keyword_logits, out.mask, batch.keyword, batch.word_s, batch.possible, hop_s)
        return {"total": clip + recipe.frame * frame, "keywords": clip, "frames": frame}


class Alternating:
    """Batches of the task whose turn it is: `parts` of them make a step."""

    def __init__(self, sources: Sequence[BatchSource], parts: int) -> None:
        self._sources = list(sources)
        self._parts = parts

    def __getitem__(self, number: int) -> Batch:
        return self._sources[number // self._parts % len(self._sources)][number]


def finetune(
    recipe: FinetuneRecipe,
    folder: Path,
    cache_folder: Path,
    *,
    init: str | None = None,
    stop_after: int | None = None,
) -> Path:
    """Fine-tune into `folder`; returns it. `load_joint` opens a finished one. Raises TrainingError."""
    origin = init or recipe.init
    if not origin:
        raise TeacherError("nothing to fine-tune: give --init, a hub name or a folder in the transformers format")
    data, train, fold = recipe.read()
    labels = labels_of(train)
    fold = [clip for clip in fold if clip.duration_s <= LONGEST_WATCHED_S]
    fold = fold[:: max(1, len(fold) // WATCHED_CLIPS)]
    recordings = [item.path for item in (*data.noises, *data.rooms) if item.split == "train"]
    cache = AudioCache.build(cache_folder, [clip.path for clip in (*train, *fold)] + recordings)
    torch.manual_seed(recipe.seed)
    model = JointModel(
        trainable(origin, recipe.layers), 1 + len(labels), speaker_dim=recipe.speaker_dim, dropout=recipe.dropout
    )
    sources = [_source(recipe, data, train, task, cache, labels) for task in recipe.tasks]
    speakers = max(source.speaker_classes for source in sources)
    stage = JointFinetuning(model, speakers, recipe)
    identity = {
        "recipe": recipe.identity(),
        "data": digest_data(data),
        "init": origin,
        "labels": labels,
    }
    job = Job(
        stage=stage,
        source=Alternating(sources, recipe.schedule.accumulate * PartialState().num_processes),
        schedule=recipe.schedule,
        seed=recipe.seed,
        folder=folder,
        identity=identity,
        watch=(lambda stage: watch(stage, fold, cache, labels, recipe.tasks)) if fold else None,
        notes={"data_root": str(recipe.data)},
        rates=(("model.trunk.", 0.0 if recipe.mode == "frozen" else recipe.trunk_rate),),
    )
    fit(job, stop_after=stop_after)
    if is_finished(folder):
        save_joint(model, labels, folder)
    return folder


def trainable(origin: str, layers: int = 0) -> SelfSupervised:
    """The model at `origin`, or its CNN and first `layers` layers, ready to be trained. Raises TeacherError."""
    teacher = load_teacher(origin)
    return student_of(teacher, layers=layers or teacher.layers)


def save_joint(model: JointModel, labels: Sequence[str], folder: Path) -> None:
    """The trunk in the transformers format, the heads beside it, and what they mean."""
    save_teacher(model.trunk, folder / "model")
    heads = {name: value for name, value in model.state_dict().items() if not name.startswith("trunk.")}
    save_file({name: value.contiguous() for name, value in heads.items()}, folder / HEADS)
    (folder / DESCRIPTION).write_text(
        json.dumps({"labels": list(labels), "speaker_dim": model.speaker_dim}, indent=1, ensure_ascii=False),
        encoding="utf-8",
    )


def load_joint(folder: Path) -> tuple[JointModel, list[str]]:
    """A finished run's model in evaluation mode, and its labels. Raises RunError, TeacherError."""
    if not (folder / DESCRIPTION).is_file():
        raise RunError(f"{folder} is not finished; the same command goes on with it")
    described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    trunk = trainable(str(folder / "model"))
    model = JointModel(trunk, 1 + len(described["labels"]), speaker_dim=described["speaker_dim"])
    model.load_state_dict(load_file(folder / HEADS), strict=False)
    return model.eval(), described["labels"]


@torch.no_grad()
def watch(
    stage: nn.Module, clips: Sequence[Clip], cache: AudioCache, labels: Sequence[str], tasks: Sequence[Task]
) -> Watched:
    """Keyword accuracy and, over all pairs of clips of one corpus, the equal error rate."""
    stage.eval()
    model: Any = stage.model
    device = next(stage.parameters()).device
    class_of = {label: index for index, label in enumerate(labels, start=1)}
    right, embeddings = [], []
    # In order of length, so that little is padded; the figures do not depend on it.
    ordered = sorted(clips, key=lambda clip: cache.length(clip.path))
    for start in range(0, len(ordered), CHUNK):
        chunk = [torch.from_numpy(cache.read(clip.path)) for clip in ordered[start : start + CHUNK]]
        lengths = torch.tensor([len(samples) for samples in chunk])
        out = model(nn.utils.rnn.pad_sequence(chunk, batch_first=True).to(device), lengths.to(device))
        right.append(event_log_odds(out.keyword_logits, out.mask).argmax(dim=1).cpu())
        embeddings.append(out.speaker_embedding.cpu())
    heard, vectors = torch.cat(right).tolist(), torch.cat(embeddings)
    figures: dict[str, float] = {}
    known = [
        class_of[clip.label] == found for clip, found in zip(ordered, heard, strict=True) if clip.label in class_of
    ]
    if "keywords" in tasks and known:
        figures["accuracy"] = float(np.mean(known))
    if "speakers" in tasks:
        similarity = (vectors @ vectors.T).numpy()
        first, second = np.triu_indices(len(ordered), 1)
        speaker = np.array([clip.speaker for clip in ordered])
        corpus = np.array([clip.corpus for clip in ordered])
        fair = (speaker[first] != "") & (speaker[second] != "") & (corpus[first] == corpus[second])
        first, second = first[fair], second[fair]
        same = speaker[first] == speaker[second]
        if same.any() and not same.all():
            scores = similarity[first, second].astype(np.float64)
            figures["eer"] = equal_error_rate(scores[same], scores[~same])
    return Watched(figures.get("accuracy", 0.0) - figures.get("eer", 0.0), figures)


def _source(
    recipe: FinetuneRecipe, data: Data, clips: Sequence[Clip], task: Task, cache: AudioCache, labels: Sequence[str]
) -> BatchSource:
    fitting = [clip for clip in clips if (clip.speaker if task == "speakers" else clip.label)]
    if not fitting:
        raise RunError(f"no training clip has a {'speaker' if task == 'speakers' else 'keyword'}")
    return BatchSource(
        data,
        fitting,
        cache,
        labels,
        batch_size=recipe.schedule.batch_size,
        seed=recipe.seed,
        sampling=recipe.sampling,
        augment=recipe.augment,
    )
