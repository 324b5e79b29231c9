"""The rows of a study: each thing that one of them needs is made when it is needed, and never twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel

from model_store import Bundle, LocalStore, builtin_store_path
from training.calibrate import TASKS, bundle_of
from training.distil import PREPROCESSOR, DistilRecipe, distil
from training.errors import RunError
from training.evaluation.client import served
from training.evaluation.cost import machine
from training.evaluation.recordings import DRAW
from training.evaluation.report import Figure, Report, evaluate
from training.evaluation.robust import NOISY, evaluate_robustness
from training.evaluation.tasks import COMMAND_CORPORA
from training.export import graph_of
from training.files import is_locked, locked, write_json
from training.finetune import HEADS, MASKS, FinetuneRecipe, finetune
from training.finished import open_run, read_run
from training.kept import Kept
from training.manifest import digest_alignments, digest_data, digest_tables, read_data
from training.outcome import FIGURES, Measured, Shared
from training.plan import Budget, StudyRecipe, distillation, tuning
from training.pretrain import PretrainRecipe, pretrain
from training.recipe import NOT_DECIDED, read_recipe
from training.revision import git_revision
from training.students.masks import load_masks, similarity
from training.teachers import load_teacher
from training.trainer import is_finished, losses_of, seconds_taken

Say = Callable[[str], None]
WEIGHTS = "model.safetensors"
TEACHER = "teacher"
# Of a bundle that was not calibrated, as those of one task or of a comparison are not, these mean nothing.
CALIBRATED = ("sv Cllr", "sv false")
# Enough for the network that a row comes to, whose times and products depend on no weight. Nobody is set aside, as
# nobody is listened to.
SKETCH, NO_FOLD = Budget(1, 1), {"fold": 0.0}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how a study is run."""

    folder: Path
    cache: Path
    split: str
    command: str
    say: Say
    data_root: Path | None = None
    budget: Budget | None = None
    noisy: bool = False
    part: bool = False  # some rows of a larger study, whose stored outcome is left alone
    # A folder that `sotto pretrain` made, instead of pre-training as the study's recipe says.
    teacher: Path | None = None
    # Where figures of rows stay (`kept.py`).
    kept: Path | None = None


class Rows:
    """What a study has made so far. Several processes may work in one folder: what one is making, others leave to it
    (`is_taken`) or wait for."""

    def __init__(self, study: StudyRecipe, setting: Setting) -> None:
        self._study, self._setting = study, setting
        self._kept = Kept(setting.kept)
        self._ready: dict[str, Path] = {}
        self._runs: dict[str, Path] = {}
        self._failed: dict[str, str] = {}
        # Now, before files change under this process.
        git_revision()

    def teacher(self) -> Path:
        """The folder of the teacher, pre-trained where that has not been done. Raises RunError."""
        return self._weights(TEACHER)

    def is_here(self, name: str) -> bool:
        """Whether the row was made in this folder, not kept from elsewhere."""
        return self._study.rows[name].bundle is not None or is_finished(self._folder(name))

    def is_taken(self, name: str) -> bool:
        """Whether another process is at work on the row, or on something that it begins with."""
        below = self._study.distil[name].teacher if name in self._study.distil else ""
        if name in self._study.rows:
            below = self._study.rows[name].init
        return is_locked(self._lock(name)) or (below != "" and self.is_taken(below))

    def measured(self, name: str) -> Measured:
        """The row with all its figures but those that are timed side by side; kept ones where there are. Raises
        TrainingError, StoreError."""
        row = self._study.rows[name]
        if row.bundle is not None:
            bundle = self._bundle(name)
            report = self._report(name, bundle, TASKS)
            return Measured(row.title, [*report.figures, _parameters(bundle)], report.det, against=row.against)
        # Before anything that takes time, or processes that began together would both have found it free.
        with locked(self._lock(name)):
            decided = self._decided(name)
            found = self._kept.row(name, decided)
            if found is None:
                found = self._measured(name)
                self._kept.keep_row(name, decided, found)
                self._keep_sharing(name)
        return replace(found, title=row.title, against=row.against)

    def _measured(self, name: str) -> Measured:
        """Of a row that was trained, and is where that has not been done."""
        row = self._study.rows[name]
        bundle, run = self._bundle(name), self._run(name)
        recipe = self._tuning(name)
        figures = [
            Figure("passes", self._passes(name), "", "batches of audio that went through the student"),
            Figure("parameters, training heads included", read_run(run)["parameters"] / 1e6, "M"),
            *self._losses(row.init),
        ]
        seconds = self._seconds(name)
        if math.isfinite(seconds):
            figures.append(Figure("training", seconds / 60, "min", "distillation included, the teacher not"))
        figures.append(_parameters(bundle))
        det = {}
        if not row.timed_only:
            report = self._report(name, bundle, recipe.tasks)
            calibrated = self._setting.budget is None and set(recipe.tasks) == set(TASKS)
            figures = [*(one for one in report.figures if calibrated or not one.name.startswith(CALIBRATED)), *figures]
            det = report.det
        return Measured(row.title, figures, det, "", row.against, machine(), read_run(run)["git_revision"])

    def graph(self, name: str) -> bytes:
        """What the row serves with; of one whose figures were kept, the same network trained for a step. Raises
        TrainingError, StoreError."""
        if not self.is_here(name):
            return graph_of(open_run(self._sketched._run(name)).network)
        bundle = self._bundle(name)
        return bundle.read(bundle.manifest.graph.file)

    def shared(self, rows: Sequence[str]) -> list[Shared]:
        """Those of the rows that share a backbone, group by group, where there are two of them."""
        groups: dict[str, list[str]] = {}
        for name in rows:
            if self._study.rows[name].together:
                groups.setdefault(self._study.rows[name].together, []).append(name)
        return [self._sharing(names) for names in groups.values() if len(names) > 1]

    def _keep_sharing(self, name: str) -> None:
        """As soon as its last row is trained, or the machine may be gone before."""
        group = self._study.rows[name].together
        names = [one for one, row in self._study.rows.items() if group and row.together == group]
        if len(names) > 1 and all(is_finished(self._folder(one)) for one in names):
            self._sharing(names)

    def _sharing(self, names: list[str]) -> Shared:
        decided = [self._decided(name) for name in names]
        kept = self._kept.shared(names, decided)
        if kept is not None:
            return kept
        runs = [self._run(name) for name in names]
        masks = {name: load_masks(run / MASKS) for name, run in zip(names, runs, strict=True)}
        alike = [
            (one, other, mean(similarity(masks[one], masks[other]).values())) for one, other in combinations(names, 2)
        ]
        backbone = self._weights(self._study.rows[names[0]].init) / WEIGHTS
        on = [float(layer.float().mean()) for mask in masks.values() for layer in mask.values()]
        sizes = [[_megabytes(run / file) for run in runs] for file in (MASKS, HEADS)]
        shared = Shared(names, _megabytes(backbone), sizes[0], sizes[1], alike, mean(on))
        self._kept.keep_shared(decided, shared)
        return shared

    @cached_property
    def _sketched(self) -> Rows:
        folder, teacher = self._setting.folder / "sketch", self.teacher()
        return Rows(self._study, replace(self._setting, folder=folder, budget=SKETCH, kept=None, teacher=teacher))

    def _weights(self, name: str) -> Path:
        """What can be begun with: the teacher, a distillation, or a row that trained weights. Raises RunError."""
        if name not in self._ready and name not in self._failed:
            try:
                self._ready[name] = self._made(name)
            # As for a row.
            except Exception as error:
                self._setting.say(f"{name} failed: {error}")
                self._failed[name] = f"{type(error).__name__}: {error}"
        if name in self._failed:
            raise RunError(f"{name} failed: {self._failed[name]}")
        return self._ready[name]

    def _made(self, name: str) -> Path:
        setting, folder = self._setting, self._setting.folder / name
        if name == TEACHER:
            if setting.teacher is not None:
                load_teacher(str(setting.teacher))  # raises where it is none
                return setting.teacher
            with locked(self._lock(name)):
                return pretrain(self._at(read_recipe(self._study.teacher, PretrainRecipe)), folder, setting.cache)
        if name in self._study.distil:
            teacher = self._weights(self._study.distil[name].teacher)
            with locked(self._lock(name)):
                setting.say(f"distilling {name}")
                distil(self._distillation(name), folder, setting.cache, teacher=str(teacher))
            return folder / "model"
        return self._run(name) / "model"

    def _folder(self, name: str) -> Path:
        return self._setting.folder / f"row-{name}" / "run"

    def _lock(self, name: str) -> Path:
        return self._setting.folder / (f"row-{name}.lock" if name in self._study.rows else f"{name}.lock")

    def _run(self, name: str) -> Path:
        """The row's fine-tuning, finished."""
        if name not in self._runs:
            init = self._weights(self._study.rows[name].init)
            run = self._folder(name)
            with locked(run.parent / "run.lock"):
                self._setting.say(f"fine-tuning {name}")
                finetune(self._tuning(name), run, self._setting.cache, init=str(init))
            self._runs[name] = run
        return self._runs[name]

    def _bundle(self, name: str) -> Bundle:
        row = self._study.rows[name]
        if row.bundle is not None:
            return LocalStore(builtin_store_path()).resolve(row.bundle)
        # A comparison ranks scores, which needs none; calibrating takes longer than training some of its rows.
        fitted = self._setting.budget is None and not row.timed_only
        return bundle_of(self._run(name), self._root, say=self._setting.say, fitted=fitted, timed_only=row.timed_only)

    def _seconds(self, name: str) -> float:
        """That its making took, of what it begins with too; the teacher's do not count."""
        if name == TEACHER:
            return 0.0
        if name in self._study.distil:
            return seconds_taken(self._setting.folder / name)
        return self._seconds(self._study.rows[name].init) + seconds_taken(self._run(name))

    def _passes(self, name: str) -> int:
        """How often the student went through a batch."""
        if name == TEACHER:
            return 0
        if name in self._study.distil:
            return self._distillation(name).schedule.steps
        recipe = self._tuning(name)
        return self._passes(self._study.rows[name].init) + recipe.schedule.steps * (1 if recipe.one_step is None else 2)

    def _losses(self, init: str) -> list[Figure]:
        """Where the distillation that a row begins with came from and got to."""
        losses = losses_of(self._setting.folder / init) if init in self._study.distil else []
        if not losses:
            return []
        tenth = max(1, len(losses) // 10)
        return [
            Figure("distillation loss, first tenth", mean(losses[:tenth]), ""),
            Figure("distillation loss, last tenth", mean(losses[-tenth:]), ""),
        ]

    def _decided(self, name: str) -> dict[str, Any]:
        """All that the row's figures come from, but for the code and with it the defaults of settings."""
        recipe = self._tuning(name)
        return {
            "recipe": _settings(recipe),
            "heard": self._heard,
            "init": self._origin(self._study.rows[name].init),
            **self._measurement(name, recipe.tasks),
        }

    @cached_property
    def _judge(self) -> dict[str, str]:
        """The teacher's files, by what is in them."""
        teacher = self._weights(TEACHER)
        files = (teacher / file for file in (WEIGHTS, "config.json", PREPROCESSOR))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}

    @cached_property
    def _heard(self) -> dict[str, str]:
        """The data: tables, recordings, and where in them the words are."""
        return digest_data(read_data(self._root)) | digest_alignments(self._root)

    def _origin(self, name: str) -> Any:
        if name == TEACHER:
            return self._judge
        if name in self._study.distil:
            return [_settings(self._distillation(name)), self._origin(self._study.distil[name].teacher)]
        return [_settings(self._tuning(name)), self._origin(self._study.rows[name].init)]

    def _measurement(self, name: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        """What is measured: rows of `sotto evaluate`, and under which noise."""
        row = self._study.rows[name]
        corpora = None if row.bundle else tuning(self._study, name).corpora
        # A model of some corpora's words is not compared with one that has to tell all of them apart.
        each = (("asc", {"asc"}), ("commands", set(COMMAND_CORPORA)))
        spoken = [one for one, heard in each if corpora is None or heard & set(corpora)]
        if corpora is None:
            spoken.insert(0, "keywords")
        wanted = [*(spoken if "keywords" in tasks else ()), *(("sv",) if "speakers" in tasks else ())]
        disturbed = ["all"] if row.grid else [NOISY] if self._setting.noisy else []
        return {
            "split": self._setting.split,
            "tables": digest_tables(self._root),
            "rows": [] if row.timed_only else wanted,
            **({"disturbed": disturbed, "draw": DRAW} if disturbed else {}),
        }

    def _report(self, name: str, bundle: Bundle, tasks: tuple[str, ...]) -> Report:
        """The recognition rows of the tasks that were trained; measured once for a graph."""
        setting = self._setting
        path = setting.folder / f"row-{name}" / FIGURES
        path.parent.mkdir(exist_ok=True)
        key = {
            "graph": bundle.manifest.files[bundle.manifest.graph.file].sha256,
            **self._measurement(name, tasks),
        }
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if all(stored.get(part) == value for part, value in key.items()):
                return Report(
                    stored["model"],
                    setting.split,
                    setting.command,
                    [Figure(**figure) for figure in stored["figures"]],
                    {curve: [(x, y) for x, y in points] for curve, points in stored["det"].items()},
                )
        data = read_data(self._root)
        with served(bundle.path) as client:
            report = evaluate(
                client,
                data,
                split=setting.split,
                rows=key["rows"],
                bundle=bundle,
                peers_python=Path("none"),
                command=setting.command,
                say=setting.say,
            )
            if "disturbed" in key:
                report.figures += evaluate_robustness(
                    client,
                    data,
                    split=setting.split,
                    command=setting.command,
                    say=setting.say,
                    tasks=tasks,
                    only=None if self._study.rows[name].grid else (NOISY,),
                ).figures
        write_json({**key, **asdict(report)}, path)
        return report

    def _distillation(self, name: str) -> DistilRecipe:
        recipe: DistilRecipe = self._at(distillation(self._study, name, self._setting.budget))
        return recipe

    def _tuning(self, name: str) -> FinetuneRecipe:
        recipe: FinetuneRecipe = self._at(tuning(self._study, name, self._setting.budget))
        return recipe

    @property
    def _root(self) -> Path:
        return self._setting.data_root or read_recipe(self._study.finetune, FinetuneRecipe).data

    def _at(self, recipe: Any) -> Any:
        root = self._setting.data_root
        changes = ({} if root is None else {"data": root}) | (NO_FOLD if self._setting.budget == SKETCH else {})
        return recipe.model_copy(update=changes)


def _settings(recipe: BaseModel) -> dict[str, Any]:
    """Those that differ from their defaults, so that a setting which is new, and is not used, changes nothing."""
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude=NOT_DECIDED)


def _parameters(bundle: Bundle) -> Figure:
    return Figure("parameters", bundle.manifest.graph.parameters / 1e6, "M")


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
