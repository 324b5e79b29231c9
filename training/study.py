"""A study: one teacher, students made from it in several ways, all measured on the same data in one run.

`sotto study FILE` trains what is missing (every step resumes where it was stopped), measures each row
through HTTP, times all graphs side by side, and writes one page. `sotto compare FILES` does the same for
several studies of one teacher together, under one budget. A row that fails is said to have failed; the
others go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_store import Bundle, LocalStore, StoreError, builtin_store_path
from training.calibrate import TASKS, bundle_of
from training.distil import DistilRecipe, distil
from training.errors import RecipeError, RunError, TrainingError
from training.evaluation.client import served
from training.evaluation.cost import latencies_ms, multiply_accumulates
from training.evaluation.report import Figure, Report, evaluate
from training.evaluation.robust import evaluate_robustness
from training.finetune import HEADS, MASKS, FinetuneRecipe, finetune
from training.finished import read_run
from training.manifest import read_data
from training.pretrain import PretrainRecipe, pretrain
from training.recipe import RecipeT, read_recipe
from training.students.masks import load_masks, similarity
from training.trainer import seconds_taken

Say = Callable[[str], None]
ScheduledT = TypeVar("ScheduledT", DistilRecipe, FinetuneRecipe)
FIGURES = "figures.json"
# What every row of a comparison is measured under, beside the recordings as they are.
NOISY = "dry, 10 dB"
WEIGHTS = "model.safetensors"


class Variant(BaseModel):
    """A recipe of `sotto distil`, and what differs from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Path
    changes: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"recipe": given} if isinstance(given, str | Path) else given


class RowRecipe(BaseModel):
    """One line of the table: a fine-tuned model, or (`bundle`) a built-in one beside which it stands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    # "teacher", or the name of one of the study's distillations, or of a row above whose weights were trained.
    init: str = "teacher"
    # What differs from the study's fine-tuning recipe.
    changes: dict[str, Any] = Field(default_factory=dict)
    bundle: str | None = None
    # Also measured under every noise and room (`sotto evaluate --robust`).
    grid: bool = False
    # Rows of masks with the same word here are meant to be used together, on one backbone.
    together: str = ""


class StudyRecipe(BaseModel):
    """The whole file; paths are taken from the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    title: str
    intro: str = ""
    teacher: Path  # a recipe of `sotto pretrain`
    distil: dict[str, Variant] = Field(default_factory=dict)
    finetune: Path
    rows: dict[str, RowRecipe] = Field(min_length=1)
    # The row that the others are compared with, and the one whose marks are spelt out.
    reference: str = "reference"
    student: str = "student"


@dataclass(frozen=True, slots=True)
class Budget:
    """Steps that every recipe of a comparison gets; where both are one step, their sum."""

    distillation: int
    finetuning: int

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "800+1600". Raises RecipeError."""
        parts = text.split("+")
        if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise RecipeError(
                f"the budget is {text!r}; wanted are steps of distillation and of fine-tuning, as in 800+1600"
            )
        return cls(int(parts[0]), int(parts[1]))


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
class Section:
    """Some of the rows, under a heading of their own."""

    title: str
    about: str
    rows: list[str]


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows of masks that share one backbone; sizes in MB, of files as they lie on disk."""

    rows: list[str]
    backbone: float
    masks: list[float]
    heads: list[float]
    # Mean cosine between the masks of two rows, over layers.
    alike: list[tuple[str, str, float]]


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
    sections: list[Section] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)

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
        sections = [Section(**section) for section in stored.pop("sections", [])]
        shared = [
            Shared(**{**one, "alike": [(first, second, float(value)) for first, second, value in one["alike"]]})
            for one in stored.pop("shared", [])
        ]
        return cls(**stored, rows=rows, sections=sections, shared=shared)

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        partial = folder / f"{FIGURES}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / FIGURES)


def load_study(path: Path) -> StudyRecipe:
    """Raises RecipeError, also where one of the recipes that it names is wrong."""
    study = read_recipe(path, StudyRecipe)
    check_study(study, str(path))
    return study


def check_study(study: StudyRecipe, where: str) -> None:
    """Raises RecipeError where its parts do not fit together."""
    read_recipe(study.teacher, PretrainRecipe)
    for name in study.distil:
        if distillation(study, name).shape == "edge":
            raise RecipeError(f"{where}: {name} distils an edge student, which `sotto train` goes on with (`init`)")
    known = {"teacher", *study.distil}
    for name in known & study.rows.keys():
        raise RecipeError(f"{where}: {name!r} is both a row and what rows begin with")
    together: dict[str, Any] = {}
    for name, row in study.rows.items():
        if row.bundle is not None:
            continue
        recipe = tuning(study, name)
        if row.init not in known:
            raise RecipeError(f"{where}: row {name} begins with {row.init!r}, which the study does not distil")
        if recipe.mode != "masks":
            known.add(name)
        if row.together:
            like = (recipe.mode, row.init, recipe.masks)
            if recipe.mode != "masks" or together.setdefault(row.together, like) != like:
                raise RecipeError(f"{where}: rows together need `mode: masks`, one init and the same masks; see {name}")
    for named in (study.reference, study.student):
        if named not in study.rows:
            raise RecipeError(f"{where}: there is no row {named!r}")


def join_studies(studies: Sequence[StudyRecipe]) -> tuple[StudyRecipe, list[Section]]:
    """One study with all their rows, and a section for each. Raises RecipeError where they are not of one teacher,
    or mean two things by one name."""
    first = studies[0]
    distil: dict[str, Variant] = {}
    rows: dict[str, RowRecipe] = {}
    sections = []
    for study in studies:
        for what, own, whole in (
            ("teacher", study.teacher, first.teacher),
            ("finetune", study.finetune, first.finetune),
            ("reference", study.reference, first.reference),
        ):
            if own != whole:
                raise RecipeError(f"{study.name} and {first.name} differ in {what}: {own}, {whole}")
        _gather(distil, study.distil, study.name)
        _gather(rows, study.rows, study.name)
        sections.append(Section(study.title, study.intro, list(study.rows)))
    joined = first.model_copy(update={"distil": distil, "rows": rows})
    check_study(joined, "together")
    return joined, sections


def only_rows(
    study: StudyRecipe, sections: Sequence[Section], names: Sequence[str]
) -> tuple[StudyRecipe, list[Section]]:
    """The study cut down to these rows, the reference, the student, and what they begin with. Raises RecipeError."""
    wanted = {study.reference, study.student}
    queue = list(names)
    while queue:
        name = queue.pop()
        if name not in study.rows and name not in study.distil:
            raise RecipeError(f"there is no row {name!r}; there are {', '.join(study.rows)}")
        wanted.add(name)
        if name in study.rows and study.rows[name].init in study.rows:
            queue.append(study.rows[name].init)
    rows = {name: row for name, row in study.rows.items() if name in wanted}
    begun = wanted | {row.init for row in rows.values()}
    distil = {name: variant for name, variant in study.distil.items() if name in begun}
    cut = [Section(one.title, one.about, [name for name in one.rows if name in rows]) for one in sections]
    return study.model_copy(update={"rows": rows, "distil": distil}), [one for one in cut if one.rows]


def _gather(whole: dict[str, Any], own: Mapping[str, Any], study: str) -> None:
    for name, part in own.items():
        if whole.setdefault(name, part) != part:
            raise RecipeError(f"{study} means something else by {name!r} than a study before it")


def distillation(study: StudyRecipe, name: str, budget: Budget | None = None) -> DistilRecipe:
    """One of the study's distillations. Raises RecipeError."""
    variant = study.distil[name]
    recipe = _changed(read_recipe(variant.recipe, DistilRecipe), variant.changes, name)
    return recipe if budget is None else _with_steps(recipe, budget.distillation)


def tuning(study: StudyRecipe, row: str, budget: Budget | None = None) -> FinetuneRecipe:
    """The study's fine-tuning recipe with the row's changes. Raises RecipeError."""
    recipe = _changed(read_recipe(study.finetune, FinetuneRecipe), study.rows[row].changes, row)
    if budget is None:
        return recipe
    return _with_steps(recipe, budget.finetuning + (budget.distillation if recipe.one_step is not None else 0))


def _changed(recipe: RecipeT, changes: Mapping[str, Any], name: str) -> RecipeT:
    """Sections are changed setting by setting."""
    shared = recipe.model_dump(mode="json")
    merged = {
        **shared,
        **{
            key: {**shared[key], **value} if isinstance(value, dict) and isinstance(shared.get(key), dict) else value
            for key, value in changes.items()
        },
        "name": name,
    }
    try:
        return type(recipe).model_validate(merged)
    except ValidationError as error:
        raise RecipeError(f"row {name}: {yaml.safe_dump(dict(changes)).strip()}: {error}") from error


def _with_steps(recipe: ScheduledT, steps: int) -> ScheduledT:
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"steps": steps})})


def run_study(study: StudyRecipe, setting: Setting, sections: Sequence[Section] = ()) -> Outcome:
    """Train and measure what has not been, and return everything. Raises TrainingError where the teacher fails;
    a distillation or row that fails is recorded."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    made = _Made(study, setting)
    rows: dict[str, Measured] = {}
    graphs: dict[str, bytes] = {}
    for name, row in study.rows.items():
        try:
            bundle, figures, det = made.row(name)
        except (TrainingError, StoreError) as error:
            setting.say(f"{name} failed: {error}")
            rows[name] = Measured(row.title, [], {}, str(error))
            continue
        graphs[name] = bundle.read(bundle.manifest.graph.file)
        rows[name] = Measured(row.title, figures, det)
    setting.say("timing all graphs side by side")
    for name, latency in latencies_ms(graphs).items():
        rows[name].figures.extend(
            [
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
        list(sections),
        made.shared([name for name, row in rows.items() if not row.error]),
    )
    outcome.write(setting.folder)
    return outcome


class _Made:
    """What a study has made so far: where each thing that a row may begin with lies, and how long it took."""

    def __init__(self, study: StudyRecipe, setting: Setting) -> None:
        self._study, self._setting = study, setting
        teacher = pretrain(
            self._at(read_recipe(study.teacher, PretrainRecipe)), setting.folder / "teacher", setting.cache
        )
        self._folders = {"teacher": teacher}
        self._seconds = {"teacher": 0.0}
        self._failed: dict[str, str] = {}
        for name in study.distil:
            setting.say(f"distilling {name}")
            folder = setting.folder / name
            try:
                recipe = self._at(distillation(study, name, setting.budget))
                distil(recipe, folder, setting.cache, teacher=str(teacher))
            except TrainingError as error:
                setting.say(f"{name} failed: {error}")
                self._failed[name] = str(error)
                continue
            self._folders[name], self._seconds[name] = folder / "model", seconds_taken(folder)

    def row(self, name: str) -> tuple[Bundle, list[Figure], dict[str, list[tuple[float, float]]]]:
        """Trained and measured. Raises TrainingError, StoreError."""
        setting, row = self._setting, self._study.rows[name]
        extra: list[Figure] = []
        tasks: tuple[str, ...] = TASKS
        if row.bundle is not None:
            bundle = LocalStore(builtin_store_path()).resolve(row.bundle)
        else:
            if row.init not in self._folders:
                raise RunError(f"{row.init} failed: {self._failed.get(row.init, 'it is a row that failed')}")
            recipe = self._at(tuning(self._study, name, setting.budget))
            tasks = recipe.tasks
            setting.say(f"fine-tuning {name}")
            run = finetune(recipe, self._run(name), setting.cache, init=str(self._folders[row.init]))
            bundle = bundle_of(run, self._root, say=setting.say)
            seconds = self._seconds[row.init] + seconds_taken(run)
            if recipe.mode != "masks":
                self._folders[name], self._seconds[name] = run / "model", seconds
            extra.append(Figure("parameters, training heads included", read_run(run)["parameters"] / 1e6, "M"))
            if seconds:
                extra.append(Figure("training", seconds / 60, "min", "distillation included, the teacher not"))
        extra.append(Figure("parameters", bundle.manifest.graph.parameters / 1e6, "M"))
        report = self._measured(name, bundle, tasks)
        return bundle, [*report.figures, *extra], report.det

    def shared(self, rows: Sequence[str]) -> list[Shared]:
        """Those of the rows that share a backbone, group by group."""
        groups: dict[str, list[str]] = {}
        for name in rows:
            if self._study.rows[name].together:
                groups.setdefault(self._study.rows[name].together, []).append(name)
        found = []
        for names in groups.values():
            runs = [self._run(name) for name in names]
            masks = {name: load_masks(run / MASKS) for name, run in zip(names, runs, strict=True)}
            alike = [(one, other, _mean(similarity(masks[one], masks[other]))) for one, other in combinations(names, 2)]
            backbone = self._folders[self._study.rows[names[0]].init] / WEIGHTS
            sizes = [[_megabytes(run / file) for run in runs] for file in (MASKS, HEADS)]
            found.append(Shared(names, _megabytes(backbone), sizes[0], sizes[1], alike))
        return found

    def _measured(self, name: str, bundle: Bundle, tasks: tuple[str, ...]) -> Report:
        """The recognition rows of the tasks that were trained; measured once for a graph."""
        setting, grid = self._setting, self._study.rows[name].grid
        path = setting.folder / f"row-{name}" / FIGURES
        path.parent.mkdir(exist_ok=True)
        wanted = [
            row for row, task in (("keywords", "keywords"), ("asc", "keywords"), ("sv", "speakers")) if task in tasks
        ]
        disturbed = ["all"] if grid else [NOISY] if setting.noisy else []
        key = {
            "graph": bundle.manifest.files[bundle.manifest.graph.file].sha256,
            "split": setting.split,
            **({"disturbed": disturbed} if disturbed else {}),
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
        path.write_text(json.dumps({**key, **asdict(report)}, indent=1, ensure_ascii=False), encoding="utf-8")
        return report

    def _run(self, name: str) -> Path:
        return self._setting.folder / f"row-{name}" / "run"

    @property
    def _root(self) -> Path:
        return self._setting.data_root or read_recipe(self._study.finetune, FinetuneRecipe).data

    def _at(self, recipe: Any) -> Any:
        root = self._setting.data_root
        return recipe if root is None else recipe.model_copy(update={"data": root})


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
