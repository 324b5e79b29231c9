"""Joint fine-tuning for keywords and speakers (Kerpicci et al. 2023, section 2.2).

One optimiser; steps alternate strictly: a batch of keywords updates everything by cross-entropy, then a
batch of speakers updates everything by the angular margin loss. `mode: frozen` trains the heads only;
`tasks` with one entry is a single-task run. `init` is any model in the transformers format: the teacher
itself (the full-size reference), a distilled student, or, with `layers`, a student cut out of the teacher
and not distilled.
"""

from __future__ import annotations

import json
from collections import Counter
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
from training.objectives.one_step import MigratingSource, OneStep, OneStepRecipe
from training.objectives.speaker import AamSoftmax
from training.objectives.spotting import clip_loss, event_log_odds, frame_loss
from training.pretrain import save_teacher
from training.recipe import CorpusRecipe
from training.rooms import with_rooms
from training.students.adapters import AdapterRecipe
from training.students.back_ends import BackEnd
from training.students.distil import student_of
from training.students.edge import EdgeOutputs
from training.students.joint import JointModel
from training.students.masks import (
    MaskRecipe,
    add_masks,
    apply_masks,
    load_masks,
    masks_of,
    save_masks,
    slim,
    trunk_digest,
)
from training.teachers import SelfSupervised, load_teacher
from training.trainer import Job, Schedule, Watched, fit, is_finished

Task = Literal["keywords", "speakers"]
HEADS, MASKS, DESCRIPTION = "heads.safetensors", "masks.safetensors", "joint.json"
LONGEST_WATCHED_S = 4.0
WATCHED_CLIPS = 600
CHUNK = 32


class FinetuneRecipe(CorpusRecipe):
    """The whole file."""

    fold: float = Field(default=0.1, ge=0, lt=1)
    init: str = ""
    layers: int = Field(default=0, ge=0)  # 0 keeps them all
    # "masks" trains a mask over the frozen trunk instead of its weights (S3-Router, `students/masks.py`).
    mode: Literal["full", "frozen", "masks"] = "full"
    masks: MaskRecipe = MaskRecipe()
    tasks: tuple[Task, ...] = ("keywords", "speakers")
    speaker_dim: int = Field(default=192, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    margin: float = Field(default=0.2, ge=0)
    scale: float = Field(default=30.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # Weight of the loss that says where in the clip the word is; 0 is the paper's.
    frame: float = Field(default=0.5, ge=0)
    # Of the schedule's rate for trunk and adapters; the heads begin from nothing and take the whole.
    trunk_rate: float = Field(default=1.0, ge=0, le=1)
    adapter_rate: float = Field(default=1.0, ge=0)
    speakers_by: BackEnd = "linear"
    adapters: AdapterRecipe | None = None
    # Distillation in the same step (OS-KDFT, `objectives/one_step.py`).
    one_step: OneStepRecipe | None = None
    # Speakers of few clips weigh as much as those of many.
    balance_speakers: bool = False
    sampling: SamplingRecipe = SamplingRecipe(crop_s=1.5)
    augment: AugmentRecipe = AugmentRecipe()
    schedule: Schedule


class JointFinetuning(nn.Module):
    """Losses of the task whose turn it is."""

    def __init__(
        self,
        model: JointModel,
        speakers: int,
        recipe: FinetuneRecipe,
        *,
        one_step: OneStep | None = None,
        speaker_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.angular = AamSoftmax(model.speaker_dim, max(1, speakers), recipe.scale, weight=speaker_weight)
        self.one_step = one_step
        self._recipe = recipe

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Of a step: the task's, and where the recipe has it the distillation's."""
        terms = self._task(batch, step)
        if self.one_step is not None:
            terms["distillation"] = self.one_step(batch, step)
            terms["total"] = terms["total"] + terms["distillation"]
        return terms

    def _task(self, batch: Batch, step: int) -> dict[str, Tensor]:
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

    def __init__(self, sources: Sequence[BatchSource | MigratingSource], parts: int) -> None:
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
    heard = with_rooms(data, recipe.simulated_rooms, cache_folder, recipe.seed)
    recordings = [item.path for item in (*heard.noises, *heard.rooms) if item.split == "train"]
    cache = AudioCache.build(cache_folder, [clip.path for clip in (*train, *fold)] + recordings)
    torch.manual_seed(recipe.seed)
    model = JointModel(
        trainable(origin, recipe.layers),
        1 + len(labels),
        speaker_dim=recipe.speaker_dim,
        dropout=recipe.dropout,
        speakers_by=recipe.speakers_by,
        adapters=recipe.adapters,
    )
    backbone = trunk_digest(model.trunk) if recipe.mode == "masks" else ""
    if recipe.mode == "masks":
        add_masks(model.trunk, recipe.masks)
    parts = recipe.schedule.accumulate * PartialState().num_processes
    sources = [_source(recipe, heard, train, task, cache, labels, parts) for task in recipe.tasks]
    speakers = max(source.speaker_classes for source in sources)
    one_step = None
    if recipe.one_step is not None:
        judge = load_teacher(recipe.one_step.teacher or origin)
        one_step = OneStep(model, judge, recipe.one_step, recipe.schedule.steps)
    weight = _speaker_weight(train, max(sources, key=lambda source: source.speaker_classes), recipe)
    stage = JointFinetuning(model, speakers, recipe, one_step=one_step, speaker_weight=weight)
    identity = {
        "recipe": recipe.identity(),
        "data": digest_data(data),
        "init": origin,
        "labels": labels,
        **({} if recipe.one_step is None else {"teacher": recipe.one_step.teacher or origin}),
    }
    job = Job(
        stage=stage,
        source=Alternating(sources, parts),
        schedule=recipe.schedule,
        seed=recipe.seed,
        folder=folder,
        identity=identity,
        same_recipe=recipe.says_the_same,
        watch=(lambda stage: watch(stage, fold, cache, labels, recipe.tasks)) if fold else None,
        notes={"data_root": str(recipe.data)},
        rates=(
            ("model.trunk.", 0.0 if recipe.mode == "frozen" else recipe.trunk_rate),
            ("model.adapters.", recipe.adapter_rate),
        ),
    )
    fit(job, stop_after=stop_after)
    # Once: others may be reading it.
    if is_finished(folder) and not (folder / DESCRIPTION).is_file():
        save_joint(model, labels, folder, recipe, backbone={"folder": origin, "digest": backbone})
    return folder


def trainable(origin: str, layers: int = 0) -> SelfSupervised:
    """The model at `origin`, or its CNN and first `layers` layers, ready to be trained. Raises TeacherError."""
    teacher = load_teacher(origin)
    return student_of(teacher, layers=layers or teacher.layers)


def save_joint(
    model: JointModel, labels: Sequence[str], folder: Path, recipe: FinetuneRecipe, *, backbone: dict[str, str]
) -> None:
    """The trunk in the transformers format, or its masks; adapters and heads beside it; and what they mean."""
    if recipe.mode == "masks":
        save_masks(masks_of(model.trunk), folder / MASKS)
    else:
        save_teacher(model.trunk, folder / "model")
    heads = {name: value for name, value in model.state_dict().items() if not name.startswith("trunk.")}
    save_file({name: value.contiguous() for name, value in heads.items()}, folder / HEADS)
    described = {
        "labels": list(labels),
        "speaker_dim": model.speaker_dim,
        "speakers_by": recipe.speakers_by,
        "adapters": None if recipe.adapters is None else recipe.adapters.model_dump(mode="json"),
        "backbone": backbone if recipe.mode == "masks" else None,
        "layers": recipe.layers if recipe.mode == "masks" else 0,
        # Frames go through the norm behind the last layer, where norms come first.
        "last_norm": True,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1, ensure_ascii=False), encoding="utf-8")


def load_joint(folder: Path) -> tuple[JointModel, list[str]]:
    """A finished run's model in evaluation mode, and its labels. Raises RunError, TeacherError."""
    if not (folder / DESCRIPTION).is_file():
        raise RunError(f"{folder} is not finished; the same command goes on with it")
    described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    trunk = _trunk(folder, described)
    if trunk.model.config.do_stable_layer_norm and not described.get("last_norm"):
        raise RunError(f"{folder} was trained without the norm behind its last layer; it has to be trained anew")
    adapters = described.get("adapters")
    model = JointModel(
        trunk,
        1 + len(described["labels"]),
        speaker_dim=described["speaker_dim"],
        speakers_by=described.get("speakers_by", "linear"),
        adapters=None if adapters is None else AdapterRecipe.model_validate(adapters),
    )
    held = load_file(folder / HEADS)
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("trunk.")}
    if own != {name: value.shape for name, value in held.items()}:
        raise RunError(f"{folder / HEADS} is not of the model that {DESCRIPTION} describes")
    model.load_state_dict(held, strict=False)
    return model.eval(), described["labels"]


def _trunk(folder: Path, described: dict[str, Any]) -> SelfSupervised:
    backbone = described.get("backbone")
    if backbone is None:
        return trainable(str(folder / "model"))
    trunk = trainable(backbone["folder"], described["layers"])
    if trunk_digest(trunk) != backbone["digest"]:
        raise RunError(f"{backbone['folder']} is not the trunk that the masks in {folder} were made for")
    apply_masks(trunk, load_masks(folder / MASKS))
    # Whole units that were switched off cost nothing from here on.
    slim(trunk)
    return trunk


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
    recipe: FinetuneRecipe,
    data: Data,
    clips: Sequence[Clip],
    task: Task,
    cache: AudioCache,
    labels: Sequence[str],
    parts: int,
) -> BatchSource | MigratingSource:
    fitting = [clip for clip in clips if (clip.speaker if task == "speakers" else clip.label)]
    if not fitting:
        raise RunError(f"no training clip has a {'speaker' if task == 'speakers' else 'keyword'}")
    one_step = recipe.one_step
    source = BatchSource(
        data,
        fitting,
        cache,
        labels,
        batch_size=recipe.schedule.batch_size,
        seed=recipe.seed,
        sampling=recipe.sampling,
        augment=recipe.augment,
        keep_clean=one_step is not None and one_step.generation == "a",
    )
    if one_step is None or one_step.generation == "a":
        return source
    return MigratingSource(
        source,
        [clip for clip in clips if one_step.corpora is None or clip.corpus in one_step.corpora],
        fitting,
        cache,
        crop_s=one_step.crop_s,
        steps=recipe.schedule.steps,
        parts=parts,
        seed=recipe.seed,
    )


def _speaker_weight(
    clips: Sequence[Clip], source: BatchSource | MigratingSource, recipe: FinetuneRecipe
) -> Tensor | None:
    """Inverse to each speaker's clips, 1 on average; every speed of a person is a speaker of its own."""
    if not recipe.balance_speakers or not source.speakers:
        return None
    counts = Counter(clip.speaker for clip in clips)
    weight = torch.tensor([1 / counts[name] for name in source.speakers]).repeat_interleave(len(recipe.augment.speeds))
    return weight / weight.mean()
