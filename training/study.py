"""A study: one teacher, students made from it in several ways, all measured on the same data in one run.

`sotto study FILE` trains what is missing (every step resumes where it was stopped), measures each row
through HTTP, times all graphs side by side, and writes one page. `sotto compare FILES` does the same for
several studies of one teacher together, under one budget. A row that fails is said to have failed; the
others go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from model_store import Bundle, LocalStore, builtin_store_path
from model_store.graph import part_of
from training.calibrate import TASKS, bundle_of
from training.distil import distil
from training.errors import RecipeError, RunError
from training.evaluation.client import served
from training.evaluation.cost import latencies_ms, machine, multiply_accumulates
from training.evaluation.recordings import DRAW
from training.evaluation.report import Figure, Report, evaluate
from training.evaluation.robust import NOISY, evaluate_robustness
from training.evaluation.tasks import COMMAND_CORPORA
from training.files import write_json
from training.finetune import HEADS, MASKS, FinetuneRecipe, finetune
from training.finished import read_run
from training.manifest import digest_tables, read_data
from training.outcome import FIGURES, Measured, Outcome, Section, Shared
from training.plan import Budget, StudyRecipe, distillation, tuning
from training.pretrain import PretrainRecipe, pretrain
from training.recipe import read_recipe
from training.students.masks import load_masks, similarity
from training.trainer import losses_of, seconds_taken

Say = Callable[[str], None]
WEIGHTS = "model.safetensors"
# The graph's output behind which no head stands.
FRAMES = "frames"
# Of a bundle that was not calibrated, as those of one task or of a comparison are not, these mean nothing.
CALIBRATED = ("sv Cllr", "sv false")


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


def run_study(study: StudyRecipe, setting: Setting, sections: Sequence[Section] = ()) -> Outcome:
    """Train and measure what has not been, and return everything. Raises TrainingError where the teacher fails or
    the folder is of another budget; a distillation or row that fails is recorded."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    _claim(setting)
    made = _Made(study, setting)
    rows: dict[str, Measured] = {}
    graphs: dict[str, bytes] = {}
    for name, row in study.rows.items():
        try:
            bundle, figures, det = made.row(name)
            graphs[name] = bundle.read(bundle.manifest.graph.file)
            rows[name] = Measured(row.title, figures, det, against=row.against)
        # Whatever one row dies of, hours of the others' work are not to be lost to it.
        except Exception as error:
            setting.say(f"{name} failed: {error}")
            rows[name] = Measured(row.title, [], {}, f"{type(error).__name__}: {error}", row.against)
    setting.say("timing all graphs side by side")
    trunks = {f"{FRAMES} of {name}": part_of(graph, (FRAMES,)) for name, graph in graphs.items()}
    latencies = latencies_ms({**graphs, **trunks})
    for name in graphs:
        latency = latencies[name]
        rows[name].figures.extend(
            [
                Figure("trunk alone, one thread", latencies[f"{FRAMES} of {name}"].one_thread, "ms"),
                Figure("one second of audio, one thread", latency.one_thread, "ms"),
                Figure("one second of audio, all threads", latency.all_threads, "ms", f"{latency.threads} threads"),
                Figure("multiply-accumulates", multiply_accumulates(graphs[name]) / 1e6, "M"),
                Figure("file", len(graphs[name]) / 1e6, "MB"),
            ]
        )
    outcome = Outcome(
        study.title,
        study.intro,
        setting.command,
        setting.split,
        study.reference,
        study.student,
        rows,
        {str(name): value for name, value in study.marks.items()},
        list(sections),
        made.shared([name for name, row in rows.items() if not row.error]),
        study.remarks,
        machine(),
    )
    if not setting.part:
        outcome.write(setting.folder)
    return outcome


def _claim(setting: Setting) -> None:
    """One folder, one budget: under another one nothing in it could go on. Raises RecipeError."""
    budget = None if setting.budget is None else asdict(setting.budget)
    path = setting.folder / "budget.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != budget:
        raise RecipeError(f"{setting.folder} holds a comparison under another budget; give --run another folder")
    write_json(budget, path)


class _Made:
    """What a study has made so far: where each thing that a row may begin with lies, and how long it took."""

    def __init__(self, study: StudyRecipe, setting: Setting) -> None:
        self._study, self._setting = study, setting
        teacher = pretrain(
            self._at(read_recipe(study.teacher, PretrainRecipe)), setting.folder / "teacher", setting.cache
        )
        self._folders = {"teacher": teacher}
        # Of each thing that rows begin with: how long it took, and how often the student went through a batch.
        self._seconds = {"teacher": 0.0}
        self._passes = {"teacher": 0}
        self._failed: dict[str, str] = {}
        for name, variant in study.distil.items():
            if variant.teacher == "teacher":
                self._distil(name)

    def _distil(self, name: str) -> None:
        setting = self._setting
        setting.say(f"distilling {name}")
        folder = setting.folder / name
        try:
            recipe = self._at(distillation(self._study, name, setting.budget))
            teacher = self._folders[self._study.distil[name].teacher]
            distil(recipe, folder, setting.cache, teacher=str(teacher))
        # As for a row.
        except Exception as error:
            setting.say(f"{name} failed: {error}")
            self._failed[name] = f"{type(error).__name__}: {error}"
            return
        self._folders[name], self._seconds[name] = folder / "model", seconds_taken(folder)
        self._passes[name] = recipe.schedule.steps

    def row(self, name: str) -> tuple[Bundle, list[Figure], dict[str, list[tuple[float, float]]]]:
        """Trained and measured. Raises TrainingError, StoreError."""
        setting, row = self._setting, self._study.rows[name]
        extra: list[Figure] = []
        tasks: tuple[str, ...] = TASKS
        if row.bundle is not None:
            bundle = LocalStore(builtin_store_path()).resolve(row.bundle)
        else:
            if row.init in self._study.distil and row.init not in self._folders.keys() | self._failed.keys():
                self._distil(row.init)
            if row.init not in self._folders:
                raise RunError(f"{row.init} failed: {self._failed.get(row.init, 'it is a row that failed')}")
            recipe = self._at(tuning(self._study, name, setting.budget))
            tasks = recipe.tasks
            setting.say(f"fine-tuning {name}")
            run = finetune(recipe, self._run(name), setting.cache, init=str(self._folders[row.init]))
            # A comparison ranks scores, which needs none; calibrating takes longer than training some of its rows.
            fitted = setting.budget is None and not row.timed_only
            bundle = bundle_of(run, self._root, say=setting.say, fitted=fitted)
            seconds = self._seconds[row.init] + seconds_taken(run)
            passes = self._passes[row.init] + recipe.schedule.steps * (1 if recipe.one_step is None else 2)
            if recipe.mode != "masks":
                self._folders[name], self._seconds[name], self._passes[name] = run / "model", seconds, passes
            extra.append(Figure("passes", passes, "", "batches of audio that went through the student"))
            extra.append(Figure("parameters, training heads included", read_run(run)["parameters"] / 1e6, "M"))
            extra += self._losses(row.init)
            if math.isfinite(seconds):
                extra.append(Figure("training", seconds / 60, "min", "distillation included, the teacher not"))
        extra.append(Figure("parameters", bundle.manifest.graph.parameters / 1e6, "M"))
        if row.timed_only:
            return bundle, extra, {}
        report = self._measured(name, bundle, tasks)
        calibrated = setting.budget is None and set(tasks) == set(TASKS)
        figures = [one for one in report.figures if calibrated or not one.name.startswith(CALIBRATED)]
        return bundle, [*figures, *extra], report.det

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

    def shared(self, rows: Sequence[str]) -> list[Shared]:
        """Those of the rows that share a backbone, group by group, where there are two of them."""
        groups: dict[str, list[str]] = {}
        for name in rows:
            if self._study.rows[name].together:
                groups.setdefault(self._study.rows[name].together, []).append(name)
        found = []
        for names in (group for group in groups.values() if len(group) > 1):
            runs = [self._run(name) for name in names]
            masks = {name: load_masks(run / MASKS) for name, run in zip(names, runs, strict=True)}
            alike = [
                (one, other, mean(similarity(masks[one], masks[other]).values()))
                for one, other in combinations(names, 2)
            ]
            backbone = self._folders[self._study.rows[names[0]].init] / WEIGHTS
            on = [float(layer.float().mean()) for mask in masks.values() for layer in mask.values()]
            sizes = [[_megabytes(run / file) for run in runs] for file in (MASKS, HEADS)]
            found.append(Shared(names, _megabytes(backbone), sizes[0], sizes[1], alike, mean(on)))
        return found

    def _measured(self, name: str, bundle: Bundle, tasks: tuple[str, ...]) -> Report:
        """The recognition rows of the tasks that were trained; measured once for a graph."""
        setting, grid = self._setting, self._study.rows[name].grid
        path = setting.folder / f"row-{name}" / FIGURES
        path.parent.mkdir(exist_ok=True)
        corpora = None if self._study.rows[name].bundle else tuning(self._study, name).corpora
        # A model of some corpora's words is not compared with one that has to tell all of them apart.
        rows = (("asc", {"asc"}), ("commands", set(COMMAND_CORPORA)))
        spoken = [row for row, heard in rows if corpora is None or heard & set(corpora)]
        if corpora is None:
            spoken.insert(0, "keywords")
        wanted = [*(spoken if "keywords" in tasks else ()), *(("sv",) if "speakers" in tasks else ())]
        disturbed = ["all"] if grid else [NOISY] if setting.noisy else []
        key = {
            "graph": bundle.manifest.files[bundle.manifest.graph.file].sha256,
            "split": setting.split,
            "tables": digest_tables(self._root),
            "rows": wanted,
            **({"disturbed": disturbed, "draw": DRAW} if disturbed else {}),
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
                rows=wanted,
                bundle=bundle,
                peers_python=Path("none"),
                command=setting.command,
                say=setting.say,
            )
            if disturbed:
                report.figures += evaluate_robustness(
                    client,
                    data,
                    split=setting.split,
                    command=setting.command,
                    say=setting.say,
                    tasks=tasks,
                    only=None if grid else (NOISY,),
                ).figures
        write_json({**key, **asdict(report)}, path)
        return report

    def _run(self, name: str) -> Path:
        return self._setting.folder / f"row-{name}" / "run"

    @property
    def _root(self) -> Path:
        return self._setting.data_root or read_recipe(self._study.finetune, FinetuneRecipe).data

    def _at(self, recipe: Any) -> Any:
        root = self._setting.data_root
        return recipe if root is None else recipe.model_copy(update={"data": root})


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
