"""One training run, from recipe to weights, top to bottom. `sotto train RECIPE.yaml` calls `train`.

A run is a folder: `run.json` says exactly what was run, `last.pt` is the newest checkpoint, `student.pt`
holds the averaged weights once finished, `tensorboard/` the curves. Every step depends only on the seed
and its own number, so a run killed anywhere and started again ends with the same weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache
from training.batches import NO_SPEAKER, Batch, BatchSource, batches, cores_for
from training.beginning import begun, check_same_people, meet
from training.beside import check_beside
from training.checkpoint import restore, save, update_average
from training.errors import RunError, TeacherError
from training.files import write_json
from training.hints import HintCache, HintHead, open_hint_teacher
from training.manifest import CALIBRATION_FOLD, Clip, Data, digest_data, digest_tables, labels_of, read_data
from training.monitor import watch
from training.objectives.soft_targets import SoftTargets, soft_loss, teaching_bundle
from training.objectives.speaker import AamSoftmax
from training.objectives.spotting import clip_loss, event_log_odds, frame_loss
from training.precision import processor_has_bf16
from training.progress import training_progress
from training.rates import learning_rate, optimizer_of
from training.recipe import HintsRecipe, Recipe, VoicesRecipe
from training.revision import git_revision
from training.rooms import with_rooms
from training.spectral import SpectralAugment
from training.students.edge import FRAME_HOP, Edge
from training.synthesis import synthesize
from training.voices import VoiceHead, Voices, speaking_bundle
from training.whisper import FOLDER, begin_trunk, encoder_weights

FRAME_HOP_S = FRAME_HOP / SAMPLE_RATE_HZ
MONITOR_EVERY_CHECKPOINTS = 2
# From which the norms of a bundle that a run begins with learn what they meet.
MEETING_BATCHES = 20


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run, ready to draw from."""

    data: Data
    heard: Data  # the same, with simulated rooms
    training: list[Clip]
    monitor: list[Clip]
    labels: list[str]
    cache: AudioCache


class TrainingHeads(nn.Module):
    """What learns beside the student and is left behind: speakers' centres, predictions of teachers' vectors."""

    def __init__(self, recipe: Recipe, speakers: int, voices: Voices | None, hints: HintCache | None = None) -> None:
        super().__init__()
        shape = recipe.shape
        self.angular = (
            AamSoftmax(shape.speaker_dim, speakers, recipe.loss.speaker_scale)
            if shape.tells_speakers and recipe.only != "keywords"
            else None
        )
        self.hint = HintHead(recipe.shape.task_width, hints.width) if hints is not None else None
        self.voice = VoiceHead(shape.speaker_dim, voices.widths) if voices is not None else None


def prepare(recipe: Recipe, cache_folder: Path) -> Prepared:
    """Read tables, make synthetic voices, decode everything once. Raises TrainingError."""
    data = read_data(recipe.data.root, calibration_fraction=recipe.data.calibration_fraction, seed=recipe.seed)
    training = chosen(recipe, data.split("train"))
    labels = labels_of(training)
    if not labels:
        raise RunError("no training clip has a keyword")
    if recipe.data.synthesis is not None:
        training += synthesize(recipe.data.synthesis, labels, cache_folder / "espeak", seed=recipe.seed)
    monitor = [clip for clip in chosen(recipe, data.split(CALIBRATION_FOLD)) if clip.duration_s <= 4.0]
    heard = with_rooms(data, recipe.data.simulated_rooms, cache_folder, recipe.seed)
    recordings = [item.path for item in (*heard.noises, *heard.rooms) if item.split == "train"]
    cache = AudioCache.build(cache_folder, [clip.path for clip in (*training, *monitor)] + recordings)
    return Prepared(data, heard, training, monitor, labels, cache)


def train(recipe: Recipe, folder: Path, cache_folder: Path, *, stop_after: int | None = None) -> Path:
    """Train, or go on training, and return the run folder. `stop_after` ends early at that step.

    What the recipe comes after is trained first, in `folder`/before. Raises RunError when `folder` holds a
    run of another recipe.
    """
    check_teachers(recipe)
    if recipe.after is not None:
        train(recipe.after, folder / "before", cache_folder)
    prepared = prepare(recipe, cache_folder)
    begun(recipe, prepared.labels)  # What cannot begin is to fail before a teacher is asked for half an hour.
    clips = [clip.path for clip in prepared.training]
    hints = voices = None
    if recipe.hints is not None:
        hints = _hints(recipe.hints, prepared, cache_folder)
    if recipe.voices is not None:
        voices = _voices(recipe, recipe.voices, clips, prepared.cache, cache_folder)
    source = BatchSource(
        prepared.heard,
        prepared.training,
        prepared.cache,
        prepared.labels,
        batch_size=recipe.schedule.batch_size,
        seed=recipe.draws_seed,
        sampling=recipe.sampling,
        augment=recipe.augment,
        steps=recipe.schedule.steps,
        hints=hints,
        voices=voices,
    )
    soft = None
    if recipe.soft_targets is not None:
        soft = SoftTargets(recipe.soft_targets.bundle, prepared.labels, threads=torch.get_num_threads())
    student = begun(recipe, prepared.labels)
    trunk = None if recipe.shape.trunk is None else begin_trunk(student.trunk, recipe.trunk.weights)
    first: dict[str, torch.Tensor] = {}
    if recipe.begin is not None:
        if recipe.shape.trunk is None and not recipe.anew:
            met = (source[step] for step in range(MEETING_BATCHES))
            meet(student, met, speakers=recipe.only != "keywords", keywords=_hears_keywords(recipe))
        first = {name: value.clone() for name, value in student.state_dict().items()}
    # Channels last is what the CPU's bfloat16 kernels want; it changes speed, not results' meaning.
    student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    heads = TrainingHeads(recipe, max(1, source.speaker_classes), voices, hints)
    if recipe.after is not None:
        go_on_from(folder / "before", student, heads)
    optimizer = optimizer_of(recipe, student, heads)
    average = {name: value.detach().clone() for name, value in student.state_dict().items()}
    _write_run_file(recipe, folder, prepared, source, student, hints, trunk)
    done = restore(folder, student, heads, optimizer, average)
    last = min(recipe.schedule.steps, stop_after or recipe.schedule.steps)
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done)
    with training_progress() as progress, cores_for(recipe.schedule.workers):
        bar = progress.add_task(recipe.name, total=recipe.schedule.steps, completed=done, loss="")
        stream = batches(source, done, last, workers=recipe.schedule.workers)
        for step, batch in enumerate(stream, start=done):
            terms = _step(recipe, step, batch, student, heads, optimizer, soft)
            update_average(average, student, recipe.schedule.average_decay, step)
            progress.update(bar, advance=1, loss=f"loss {terms['total']:.3f}")
            if step % 20 == 0:
                for name, value in terms.items():
                    writer.add_scalar(f"loss/{name}", value, step)
            finished = step + 1
            if finished % recipe.schedule.checkpoint_every == 0 or finished == last:
                save(folder, finished, student, heads, optimizer, average)
                checkpoints = finished // recipe.schedule.checkpoint_every
                if prepared.monitor and checkpoints % MONITOR_EVERY_CHECKPOINTS == 0:
                    seen = watch(_averaged(recipe, prepared, average), prepared)
                    for name, value in seen.items():
                        writer.add_scalar(f"calibration-fold/{name}", value, finished)
                    progress.console.print(finished, {name: round(value, 4) for name, value in seen.items()})
    writer.close()
    if last == recipe.schedule.steps:
        if recipe.before_share:
            before = first or load_student(folder / "before")[0].state_dict()
            average = mixed(average, before, recipe.before_share)
        torch.save(average, folder / "student.partial")
        (folder / "student.partial").replace(folder / "student.pt")
    return folder


def _hints(wanted: HintsRecipe, prepared: Prepared, folder: Path) -> HintCache:
    """What the teacher says about the clips that it is to hear. Raises TeacherError, RunError."""
    teacher = open_hint_teacher(wanted.network, wanted.teacher, threads=torch.get_num_threads())
    unknown = set(wanted.corpora or ()) - {clip.corpus for clip in prepared.training}
    if unknown:
        raise RunError(f"hints are to be about {', '.join(sorted(unknown))}, of which there are no training clips")
    heard = [clip.path for clip in prepared.training if wanted.corpora is None or clip.corpus in wanted.corpora]
    return HintCache.build(folder, teacher, heard, prepared.cache)


def _voices(recipe: Recipe, wanted: VoicesRecipe, clips: list[Path], audio: AudioCache, folder: Path) -> Voices:
    """What the speaker teachers say about the clips. Raises TeacherError."""
    speeds = recipe.augment.speeds if wanted.all_speeds else (1.0,)
    voices = Voices.build(folder, clips, wanted.python, speeds)
    if wanted.bundle is None:
        return voices
    return voices.beside(Voices.of_bundle(folder, clips, wanted.bundle, audio, speeds))


def check_teachers(recipe: Recipe) -> None:
    """An hour of the stages before is not to pass before a teacher is missed. Raises TeacherError."""
    if recipe.hints is not None:
        open_hint_teacher(recipe.hints.network, recipe.hints.teacher)
    if recipe.voices is not None:
        check_beside(recipe.voices.python, TeacherError)
        if recipe.voices.bundle is not None:
            speaking_bundle(recipe.voices.bundle)
    if recipe.soft_targets is not None:
        teaching_bundle(recipe.soft_targets.bundle)
    if recipe.shape.trunk is not None:
        encoder_weights(recipe.trunk.weights or FOLDER)
    if recipe.begin is not None:
        check_same_people(recipe, teaching_bundle(recipe.begin), digest_tables(recipe.data.root))


def go_on_from(before: Path, student: Edge, heads: TrainingHeads) -> None:
    """Take over the averaged weights of a finished run with the same data, and those of its heads that are here with
    the same shape. Early layers that only this student's speaker branch has begin as copies, and what joins it to
    other layers than before begins anew. Raises RunError where anything else does not fit."""
    first = load_student(before)[0].state_dict()
    copies = {f"speaker_{name}": value for name, value in first.items() if name.startswith(("stem.", "early."))}
    weights = student.state_dict()
    fitting = {
        name: value
        for name, value in (copies | first).items()
        if name in weights and value.shape == weights[name].shape
    }
    unlike = [name for name in weights if name not in fitting and not name.startswith("to_speaker.")]
    if unlike:
        raise RunError(f"{before} holds a student of another shape ({unlike[0]}, {len(unlike)} in all)")
    student.load_state_dict(weights | fitting)
    own = heads.state_dict()
    given = torch.load(before / "last.pt", weights_only=True)["heads"]
    # With other speeds there are other speakers.
    taken = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    heads.load_state_dict(taken, strict=False)


def mixed(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Weights and statistics between two networks of one shape, `share` of the way from `own` to `other`."""
    return {
        name: value.lerp(other[name], share) if value.dtype.is_floating_point else value for name, value in own.items()
    }


def load_student(folder: Path) -> tuple[Edge, dict[str, Any]]:
    """The averaged student of a finished run, in evaluation mode, and its run.json. Raises RunError."""
    run_file, weights = folder / "run.json", folder / "student.pt"
    if not run_file.is_file():
        raise RunError(f"{folder} is no run folder: run.json is missing")
    if not weights.is_file():
        raise RunError(f"{folder} is not finished; `sotto train` with the same recipe goes on with it")
    run = json.loads(run_file.read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(run["recipe"])
    student = Edge(1 + len(run["labels"]), recipe.shape)
    student.load_state_dict(torch.load(weights, weights_only=True))
    return student.eval(), run


def _step(
    recipe: Recipe,
    step: int,
    batch: Batch,
    student: Edge,
    heads: TrainingHeads,
    optimizer: torch.optim.Optimizer,
    soft: SoftTargets | None,
) -> dict[str, float]:
    """One update of all that learns with its tasks' losses added; returns the terms."""
    torch.manual_seed(recipe.draws_seed * 1_000_003 + step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step) * group.get("rate", 1.0)
    student.train()
    if student.shape.trunk is not None:
        student.trunk.hold(recipe.trunk.learning)
    if recipe.only == "speakers":
        student.hold_keywords()
    elif recipe.only == "keywords":
        student.hold_speakers()
    weights = recipe.loss
    spectral = SpectralAugment(recipe.spectral, len(batch.lengths), torch.default_generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=_in_bf16(recipe)):
        shared = weights.shared_gradient if step >= weights.shared_gradient_from_step else 1.0
        out = student(
            batch.waveform,
            batch.lengths,
            spectral,
            shared_gradient=shared,
            speakers=recipe.only != "keywords",
            keywords=_hears_keywords(recipe),
        )
    known = (batch.speaker != NO_SPEAKER) & ~spectral.warped
    total = out.speaker_embedding.sum() * 0.0
    terms = {}
    if recipe.only != "speakers":
        terms["clip"] = clip_loss(out.keyword_logits, out.mask, batch.keyword, batch.possible, weights.label_smoothing)
        terms["frame"] = frame_loss(
            out.keyword_logits, out.mask, batch.keyword, batch.word_s, batch.possible, FRAME_HOP_S
        )
        total = total + weights.clip * terms["clip"] + weights.frame * terms["frame"]
    if heads.angular is not None:
        margin = weights.speaker_margin * min(1.0, step / max(1, weights.margin_warmup_steps))
        voices = out.speaker_embedding[known]
        terms["speaker"] = heads.angular(voices, batch.speaker[known], margin) if known.any() else voices.sum() * 0.0
        total = total + weights.speaker * terms["speaker"]
    if heads.hint is not None and recipe.hints is not None and batch.hint is not None and batch.hinted is not None:
        spoken = out.frames[..., : recipe.shape.task_width]
        terms["hint"] = heads.hint.loss(spoken, batch.hint, batch.hinted)
        total = total + recipe.hints.weight * terms["hint"]
    if heads.voice is not None and recipe.voices is not None and batch.voice is not None:
        terms["voice"] = heads.voice.loss(out.speaker_embedding, batch.voice, ~spectral.warped)
        total = total + recipe.voices.weight * terms["voice"]
    if soft is not None and recipe.soft_targets is not None:
        own = event_log_odds(out.keyword_logits, out.mask)
        told = soft(batch.waveform, batch.lengths, out.mask)
        terms["soft"] = soft_loss(own, told, batch.possible, recipe.soft_targets.temperature)
        total = total + recipe.soft_targets.weight * terms["soft"]
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(total)
    parameters = (*student.parameters(), *heads.parameters())
    nn.utils.clip_grad_norm_(parameters, recipe.schedule.gradient_clip)
    optimizer.step()
    return {name: float(value.detach()) for name, value in {"total": total, **terms}.items()}


def _averaged(recipe: Recipe, prepared: Prepared, average: dict[str, torch.Tensor]) -> Edge:
    student = Edge(1 + len(prepared.labels), recipe.shape)
    student.load_state_dict(average)
    return student.eval()


def _hears_keywords(recipe: Recipe) -> bool:
    """Where speakers learn alone in a branch that shares nothing, words would take time for nothing."""
    return recipe.only != "speakers" or recipe.shape.speaker_from != "features"


def _in_bf16(recipe: Recipe) -> bool:
    return recipe.schedule.precision == "bfloat16" and processor_has_bf16()


def _write_run_file(
    recipe: Recipe,
    folder: Path,
    prepared: Prepared,
    source: BatchSource,
    student: Edge,
    hints: HintCache | None,
    trunk: str | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if not recipe.says_the_same(begun["recipe"]):
            raise RunError(f"{folder} holds a run of another recipe; give --run another folder")
        if begun["data"] != digest_data(prepared.data):
            raise RunError(f"the data changed since {folder} was begun; give --run another folder")
        return
    run = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest(),
        "seed": recipe.seed,
        "data": digest_data(prepared.data),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "computed_in": "bfloat16" if _in_bf16(recipe) else "float32",
        "labels": prepared.labels,
        "init": hashlib.sha256(recipe.init.read_bytes()).hexdigest() if recipe.init else None,
        "begin": teaching_bundle(recipe.begin).digest if recipe.begin else None,
        "before": hashlib.sha256((folder / "before/student.pt").read_bytes()).hexdigest() if recipe.after else None,
        "soft_targets": teaching_bundle(recipe.soft_targets.bundle).digest if recipe.soft_targets else None,
        "trunk": trunk,
        "hints": None if hints is None else hints.teacher,
        "voices": teaching_bundle(recipe.voices.bundle).digest if recipe.voices and recipe.voices.bundle else None,
        "training_clips": len(prepared.training),
        "speakers": len(source.speakers),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
    }
    write_json(run, path)


def chosen(recipe: Recipe, clips: list[Clip]) -> list[Clip]:
    """Those of the clips that the recipe takes: its corpora, and at most about so many of each."""
    if recipe.data.corpora is not None:
        clips = [clip for clip in clips if clip.corpus in recipe.data.corpora]
    most = recipe.data.most_clips_per_corpus
    if most is None:
        return clips
    kept: dict[str, int] = {}
    result = []
    # Striding instead of taking the first ones keeps all speakers and words in.
    counts: dict[str, int] = {}
    for clip in clips:
        counts[clip.corpus] = counts.get(clip.corpus, 0) + 1
    for clip in clips:
        position = kept.get(clip.corpus, 0)
        kept[clip.corpus] = position + 1
        if position % max(1, counts[clip.corpus] // most) == 0:
            result.append(clip)
    return result
