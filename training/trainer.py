"""The loop behind pre-training, distillation and fine-tuning: one CPU, one GPU or several, through accelerate.

A stage is a module that maps (batch, step) to named losses, "total" among them. What a micro-batch holds is
a pure function of its number, and every micro-step seeds its own randomness, so a run that is killed
anywhere continues as if it had not been. `sotto train` has its own loop in `run.py`: the edge student's
recipe (weight averages, calmer endings) shares little with this one.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from training.errors import RunError
from training.files import write_json
from training.long_convolution import transform_long_convolutions
from training.precision import computed_in
from training.progress import training_progress
from training.revision import git_revision

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


class Schedule(BaseModel):
    """AdamW (Loshchilov & Hutter 2019), linear warm-up, then cosine or linear decay to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    batch_size: int = Field(default=16, gt=0)
    # Micro-batches of `batch_size` whose gradients are averaged for one step, on each process.
    accumulate: int = Field(default=1, gt=0)
    warmup: float = Field(default=0.07, ge=0, lt=1)
    peak_learning_rate: float = Field(default=2e-4, gt=0)
    decay: Literal["cosine", "linear"] = "linear"
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip: float = Field(default=5.0, gt=0)
    # "bf16": 32 bits on a processor that would emulate it.
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = Field(default=1, ge=0)
    checkpoint_every: int = Field(default=200, gt=0)
    # Looking at the fold, and stopping after `patience` looks without a better one; 0 never stops.
    watch_every: int = Field(default=500, gt=0)
    patience: int = Field(default=0, ge=0)

    def learning_rate(self, step: int) -> float:
        """Of the step with this number."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.peak_learning_rate * (step + 1) / warmup
        left = 1 - (step - warmup) / max(1, self.steps - warmup)
        return self.peak_learning_rate * (left if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


class Source(Protocol[BatchT_co]):
    """Micro-batches by number."""

    def __getitem__(self, index: int, /) -> BatchT_co: ...


@dataclass(frozen=True, slots=True)
class Watched:
    """What the fold says: `score` (higher is better) decides what is kept, `figures` are written down."""

    score: float
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Job(Generic[BatchT]):
    """All that `fit` needs to know of a run."""

    stage: nn.Module  # forward(batch, step) -> {"total": scalar, ...}
    source: Source[BatchT]
    schedule: Schedule
    seed: int
    folder: Path
    identity: dict[str, Any]  # what was run; another identity in the same folder is refused
    watch: Callable[[nn.Module], Watched] | None = None
    # Learning rates relative to the schedule's, by prefix of the parameter's name; 0 freezes.
    rates: tuple[tuple[str, float], ...] = ()
    # Whether the recipe in a stored identity is this run's, where a plain comparison is too strict.
    same_recipe: Callable[[dict[str, Any]], bool] | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # written into run.json beside the identity


def fit(job: Job[BatchT], *, stop_after: int | None = None) -> nn.Module:
    """Train `job.stage`, or go on training it; returns it with its final weights (the best ones where the
    fold was watched with patience).

    Raises RunError when the folder holds another run or the loss is no longer a number.
    """
    schedule = job.schedule
    # Of a run before this one in the same process, which may have had another precision.
    AcceleratorState._reset_state()
    precision = computed_in(schedule.precision, "cuda" if torch.accelerator.is_available() else "cpu")
    accelerator = Accelerator(
        mixed_precision=precision,
        # Alternating tasks leave one head without gradient in every step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.is_main_process:
        _claim(job, precision)
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cpu":
        _attend_plainly(job.stage)
        transform_long_convolutions(job.stage)
    optimizer = _optimizer(job)
    state = _Progress()
    state.restore(job, optimizer)
    # The loader is not handed to accelerate: which micro-batch is whose follows from its number.
    stage, optimizer = accelerator.prepare(job.stage, optimizer)
    writer = (
        SummaryWriter(str(job.folder / "tensorboard"), purge_step=state.step) if accelerator.is_main_process else None
    )
    last = min(schedule.steps, stop_after or schedule.steps)
    world, rank = accelerator.num_processes, accelerator.process_index
    own = [
        (step * schedule.accumulate + part) * world + rank
        for step in range(state.step, 0 if state.stopped else last)
        for part in range(schedule.accumulate)
    ]
    numbered = zip(own, _load(job.source, own, schedule.workers), strict=True)
    latest: dict[str, float] = {}
    clock = time.monotonic()
    with training_progress(disable=not accelerator.is_main_process) as progress:
        bar = progress.add_task(job.folder.name, total=schedule.steps, completed=state.step, loss="")
        while state.step < last and not state.stopped:
            terms = _step(accelerator, job, stage, optimizer, state.step, numbered)
            state.step += 1
            state.losses.append(terms["total"])
            progress.update(bar, completed=state.step, loss=f"loss {terms['total']:.3f}")
            # Alternating tasks give other terms each step; every tenth would be of one task for ever.
            latest.update(terms)
            if writer is not None and state.step % 10 == 0:
                for name, value in latest.items():
                    writer.add_scalar(f"loss/{name}", value, state.step)
            finished = state.step == last
            if job.watch is not None and (state.step % schedule.watch_every == 0 or state.step == schedule.steps):
                watched = job.watch(accelerator.unwrap_model(stage))
                state.look(job, watched, main=accelerator.is_main_process)
                if writer is not None:
                    for name, value in watched.figures.items():
                        writer.add_scalar(f"fold/{name}", value, state.step)
                    progress.console.print(
                        state.step, {name: round(value, 4) for name, value in watched.figures.items()}
                    )
            if accelerator.is_main_process and (
                state.step % schedule.checkpoint_every == 0 or finished or state.stopped
            ):
                now = time.monotonic()
                state.seconds, clock = state.seconds + now - clock, now
                state.save(job, optimizer)
    if writer is not None:
        writer.close()
    accelerator.wait_for_everyone()
    best = job.folder / "best.pt"
    if schedule.patience and best.is_file() and (state.stopped or state.step == schedule.steps):
        job.stage.load_state_dict(torch.load(best, weights_only=True, map_location="cpu"))
    accelerator.free_memory()
    return job.stage.eval()


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has done all its steps or was stopped by its fold."""
    path = folder / "last.pt"
    if not path.is_file():
        return False
    state = torch.load(path, weights_only=True, map_location="cpu")
    return bool(state["stopped"]) or int(state["step"]) >= int(state["steps"])


def seconds_taken(folder: Path) -> float:
    """By the run in `folder` up to its last checkpoint, looks at the fold included; not a number where some of it
    was not noted."""
    return float(torch.load(folder / "last.pt", weights_only=True, map_location="cpu").get("seconds", math.nan))


def losses_of(folder: Path) -> list[float]:
    """Of every step that the run in `folder` made, up to its last checkpoint; none where some were not noted."""
    state = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")
    found: list[float] = state.get("losses", [])
    return found if len(found) == state["step"] else []


@dataclass(slots=True)
class _Progress:
    """How far a run is, and how well it and its fold did so far."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: float = -math.inf
    looks_since: int = 0
    stopped: bool = False

    def look(self, job: Job[Any], watched: Watched, *, main: bool) -> None:
        if watched.score > self.best:
            self.best, self.looks_since = watched.score, 0
            if main and job.schedule.patience:
                _replace(job.folder / "best.pt", job.stage.state_dict())
            return
        self.looks_since += 1
        self.stopped = bool(job.schedule.patience) and self.looks_since >= job.schedule.patience

    def save(self, job: Job[Any], optimizer: torch.optim.Optimizer) -> None:
        state = {
            "step": self.step,
            "losses": self.losses,
            "seconds": self.seconds,
            "steps": job.schedule.steps,
            "best": self.best,
            "looks_since": self.looks_since,
            "stopped": self.stopped,
            "stage": job.stage.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        _replace(job.folder / "last.pt", state)

    def restore(self, job: Job[Any], optimizer: torch.optim.Optimizer) -> None:
        path = job.folder / "last.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        job.stage.load_state_dict(state["stage"])
        optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = int(state["step"]), float(state["best"])
        self.seconds = float(state.get("seconds", math.nan))
        self.losses = list(state.get("losses", []))
        self.looks_since, self.stopped = int(state["looks_since"]), bool(state["stopped"])


def _step(
    accelerator: Accelerator,
    job: Job[BatchT],
    stage: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    numbered: Iterator[tuple[int, BatchT]],
) -> dict[str, float]:
    """One update from `accumulate` micro-batches; returns the losses' means."""
    schedule = job.schedule
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(step) * group["rate"]
    stage.train()
    sums: dict[str, float] = {}
    for part in range(schedule.accumulate):
        number, batch = next(numbered)
        torch.manual_seed(job.seed * 1_000_003 + number)
        # Processes exchange gradients once a step, after the last part.
        together = nullcontext() if part == schedule.accumulate - 1 else accelerator.no_sync(stage)
        with together:
            terms: dict[str, Tensor] = stage(to_device(batch, accelerator.device), step)
            total = terms["total"].item()
            if not math.isfinite(total):
                raise RunError(f"the loss is {total} at step {step}; a lower learning rate may help")
            accelerator.backward(terms["total"] / schedule.accumulate)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / schedule.accumulate
    accelerator.clip_grad_norm_(stage.parameters(), schedule.gradient_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums


def to_device(batch: Any, device: torch.device) -> Any:
    """The dataclass `batch` with its tensors on `device`."""
    if device.type == "cpu" or not is_dataclass(batch):
        return batch
    moved = {
        each.name: value.to(device) if isinstance(value := getattr(batch, each.name), Tensor) else value
        for each in fields(batch)
    }
    kind: Any = type(batch)
    return kind(**moved)


class _BySource(Dataset[BatchT]):
    def __init__(self, source: Source[BatchT]) -> None:
        self._source = source

    def __getitem__(self, index: int) -> BatchT:
        return self._source[index]


def _load(source: Source[BatchT], numbers: Sequence[int], workers: int) -> Iterator[BatchT]:
    loader: DataLoader[BatchT] = DataLoader(
        _BySource(source),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    yield from loader


def _optimizer(job: Job[Any]) -> torch.optim.AdamW:
    """Decay acts on matrices and kernels only. Parameters of rate 0 are frozen."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in job.stage.named_parameters():
        rate = next((rate for prefix, rate in job.rates if name.startswith(prefix)), 1.0)
        parameter.requires_grad_(rate > 0 and parameter.requires_grad)
        if parameter.requires_grad:
            # Of masks' scores only the order means anything.
            groups.setdefault((rate, parameter.ndim > 1 and not name.endswith(".score")), []).append(parameter)
    decay = job.schedule.weight_decay
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rate, "weight_decay": decay if matrix else 0.0}
            for (rate, matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=job.schedule.peak_learning_rate,
        betas=(0.9, 0.98),
        # One pass over each parameter instead of six: a third of the time on a CPU.
        fused=True,
    )


def _attend_plainly(stage: nn.Module) -> None:
    """Attention as written. Backward through torch's fused kernel takes a third of a step on a CPU, nearly all of
    which the plain products save: clips are short, so there is no memory to save."""
    for module in stage.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")


def _claim(job: Job[Any], precision: str) -> None:
    """Write `run.json`, or check that the one there is of the same run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "run.json"
    identity = json.loads(json.dumps({**job.identity, "seed": job.seed, "schedule": job.schedule.model_dump()}))
    if path.is_file():
        # `sotto train` keeps a run.json of its own, without an identity.
        begun = json.loads(path.read_text(encoding="utf-8"))
        stored = begun.get("identity")
        if stored is None or not _is_same_run(job, stored, identity):
            raise RunError(f"{job.folder} holds a run of something else; give --run another folder")
        if precision not in begun.get("computed_in", precision).split(", then "):
            write_json({**begun, "computed_in": f"{begun['computed_in']}, then {precision}"}, path)
        return
    run = {
        "identity": identity,
        **job.notes,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "computed_in": precision,
        "parameters": sum(parameter.numel() for parameter in job.stage.parameters()),
    }
    write_json(run, path)


def _is_same_run(job: Job[Any], stored: dict[str, Any], identity: dict[str, Any]) -> bool:
    if job.same_recipe is None or "recipe" not in stored or not job.same_recipe(stored["recipe"]):
        return stored == identity
    rest, own = ({**one, "recipe": None, "schedule": None} for one in (stored, identity))
    return rest == own and Schedule.model_validate(stored["schedule"]) == job.schedule


def _replace(path: Path, state: object) -> None:
    """A crash leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
