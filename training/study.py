"""A study: one teacher, students made from it in several ways, all measured on the same data in one run.

`sotto study FILE` trains what is missing (every step resumes where it was stopped), measures each row
through HTTP, times all graphs side by side, and writes one page. A row that fails is said to have failed;
the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store import Bundle, LocalStore, StoreError, builtin_store_path
from training.calibrate import TASKS, bundle_of
from training.distil import DistilRecipe, distil
from training.errors import RecipeError, TrainingError
from training.evaluation.client import served
from training.evaluation.cost import latencies_ms, multiply_accumulates
from training.evaluation.report import Figure, Report, evaluate
from training.finetune import FinetuneRecipe, finetune
from training.finished import read_run
from training.manifest import read_data
from training.pretrain import PretrainRecipe, pretrain
from training.recipe import read_recipe

Say = Callable[[str], None]
FIGURES = "figures.json"


class RowRecipe(BaseModel):
    """One line of the table: a fine-tuned model, or (`bundle`) a built-in one beside which it stands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    # "teacher", or the name of one of the study's distillations.
    init: str = "teacher"
    # What differs from the study's fine-tuning recipe.
    changes: dict[str, Any] = Field(default_factory=dict)
    bundle: str | None = None


class StudyRecipe(BaseModel):
    """The whole file; paths are taken from the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    title: str
    intro: str = ""
    teacher: Path  # a recipe of `sotto pretrain`
    distil: dict[str, Path] = Field(default_factory=dict)
    finetune: Path
    rows: dict[str, RowRecipe] = Field(min_length=1)
    # The row that the others are compared with, and the one whose marks are spelt out.
    reference: str = "reference"
    student: str = "student"


@dataclass(frozen=True, slots=True)
class Measured:
    """One row's figures. What was not measured is absent from `figures`."""

    title: str
    figures: list[Figure]
    det: dict[str, list[tuple[float, float]]]
    error: str = ""

    def value(self, name: str) -> float:
        return Report("", "", "", self.figures).value(name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that the page says."""

    title: str
    intro: str
    command: str
    split: str
    reference: str
    student: str
    rows: dict[str, Measured]

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """Of a study that was run into `folder`. Raises RecipeError where there is none."""
        path = folder / FIGURES
        if not path.is_file():
            raise RecipeError(f"{folder} holds no figures; `sotto study` makes them")
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = {
            name: Measured(
                row["title"],
                [Figure(**figure) for figure in row["figures"]],
                {curve: [(float(x), float(y)) for x, y in points] for curve, points in row["det"].items()},
                row["error"],
            )
            for name, row in stored.pop("rows").items()
        }
        return cls(**stored, rows=rows)

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        partial = folder / f"{FIGURES}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / FIGURES)


def load_study(path: Path) -> StudyRecipe:
    """Raises RecipeError, also where one of the recipes that it names is wrong."""
    study = read_recipe(path, StudyRecipe)
    read_recipe(study.teacher, PretrainRecipe)
    for name, recipe in study.distil.items():
        if read_recipe(recipe, DistilRecipe).shape != "distilhubert":
            raise RecipeError(f"{path}: {name} distils an edge student, which `sotto train` goes on with (`init`)")
    for name, row in study.rows.items():
        if row.bundle is None:
            tuning(study, name)
            if row.init != "teacher" and row.init not in study.distil:
                raise RecipeError(f"{path}: row {name} begins with {row.init!r}, which the study does not distil")
    for named in (study.reference, study.student):
        if named not in study.rows:
            raise RecipeError(f"{path}: there is no row {named!r}")
    return study


def tuning(study: StudyRecipe, row: str) -> FinetuneRecipe:
    """The study's fine-tuning recipe with the row's changes. Raises RecipeError."""
    shared = read_recipe(study.finetune, FinetuneRecipe).model_dump(mode="json")
    changes = study.rows[row].changes
    merged = {
        **shared,
        **{
            name: {**shared[name], **value} if isinstance(value, dict) and name in shared else value
            for name, value in changes.items()
        },
        "name": row,
    }
    try:
        return FinetuneRecipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(f"row {row}: {yaml.safe_dump(changes).strip()}: {error}") from error


def run_study(
    study: StudyRecipe, folder: Path, cache: Path, *, data_root: Path | None, split: str, command: str, say: Say
) -> Outcome:
    """Train and measure what has not been, and return everything. Raises TrainingError where the teacher or a
    distillation fails; a failing row is recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher_recipe = read_recipe(study.teacher, PretrainRecipe)
    inits = {"teacher": pretrain(_at(teacher_recipe, data_root), folder / "teacher", cache)}
    for name, path in study.distil.items():
        say(f"distilling {name}")
        distilled = distil(
            _at(read_recipe(path, DistilRecipe), data_root), folder / name, cache, teacher=str(inits["teacher"])
        )
        inits[name] = distilled / "model"
    rows: dict[str, Measured] = {}
    graphs: dict[str, bytes] = {}
    for name, row in study.rows.items():
        try:
            bundle, figures, det = _row(study, name, folder, inits, cache, data_root, split, command, say)
        except (TrainingError, StoreError) as error:
            say(f"{name} failed: {error}")
            rows[name] = Measured(row.title, [], {}, str(error))
            continue
        graphs[name] = bundle.read(bundle.manifest.graph.file)
        rows[name] = Measured(row.title, figures, det)
    say("timing all graphs side by side")
    for name, latency in latencies_ms(graphs).items():
        rows[name].figures.extend(
            [
                Figure("one second of audio, one thread", latency.one_thread, "ms"),
                Figure("one second of audio, all threads", latency.all_threads, "ms", f"{latency.threads} threads"),
                Figure("multiply-accumulates", multiply_accumulates(graphs[name]) / 1e6, "M"),
                Figure("file", len(graphs[name]) / 1e6, "MB"),
            ]
        )
    outcome = Outcome(study.title, study.intro, command, split, study.reference, study.student, rows)
    outcome.write(folder)
    return outcome


def _row(
    study: StudyRecipe,
    name: str,
    folder: Path,
    inits: dict[str, Path],
    cache: Path,
    data_root: Path | None,
    split: str,
    command: str,
    say: Say,
) -> tuple[Bundle, list[Figure], dict[str, list[tuple[float, float]]]]:
    row = study.rows[name]
    own = folder / f"row-{name}"
    own.mkdir(exist_ok=True)
    root = data_root or read_recipe(study.finetune, FinetuneRecipe).data
    extra: list[Figure] = []
    tasks: tuple[str, ...] = TASKS
    if row.bundle is not None:
        bundle = LocalStore(builtin_store_path()).resolve(row.bundle)
    else:
        recipe = _at(tuning(study, name), data_root)
        tasks = recipe.tasks
        say(f"fine-tuning {name}")
        run = finetune(recipe, own / "run", cache, init=str(inits[row.init]))
        bundle = bundle_of(run, root, say=say)
        extra.append(Figure("parameters, training heads included", read_run(run)["parameters"] / 1e6, "M"))
    extra.append(Figure("parameters", bundle.manifest.graph.parameters / 1e6, "M"))
    report = _measured(own, bundle, tasks, root, split, command, say)
    return bundle, [*report.figures, *extra], report.det


def _measured(
    own: Path, bundle: Bundle, tasks: tuple[str, ...], root: Path, split: str, command: str, say: Say
) -> Report:
    """The recognition rows of the tasks that were trained; measured once for a graph."""
    path = own / FIGURES
    key = bundle.manifest.files[bundle.manifest.graph.file].sha256
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["graph"] == key and stored["split"] == split:
            return Report(
                stored["model"],
                split,
                command,
                [Figure(**figure) for figure in stored["figures"]],
                {curve: [(x, y) for x, y in points] for curve, points in stored["det"].items()},
            )
    wanted = [row for row, task in (("keywords", "keywords"), ("asc", "keywords"), ("sv", "speakers")) if task in tasks]
    with served(bundle.path) as client:
        report = evaluate(
            client,
            read_data(root),
            split=split,
            rows=wanted,
            bundle=bundle,
            peers_python=Path("none"),
            command=command,
            say=say,
        )
    path.write_text(json.dumps({"graph": key, **asdict(report)}, indent=1, ensure_ascii=False), encoding="utf-8")
    return report


def _at(recipe: Any, root: Path | None) -> Any:
    return recipe if root is None else recipe.model_copy(update={"data": root})
