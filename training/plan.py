"""What a study plans: recipes by name, the rows of its table, and the budget that several studies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.distil import DistilRecipe
from training.errors import RecipeError
from training.finetune import FinetuneRecipe
from training.outcome import Section
from training.pretrain import PretrainRecipe
from training.recipe import RecipeT, read_recipe

ScheduledT = TypeVar("ScheduledT", DistilRecipe, FinetuneRecipe)
COMPARED = """Teacher and students are the papers' scaled down to what two cores train (the recipes say how). Every
distillation had {distillation} steps and every fine-tuning {finetuning}; where both are one step, half of their sum, as
each of these takes the student through two batches. `passes` are those batches: rows that go on from another row, or
were not distilled, have more or fewer. Fine-tuning turns from task to task: what was tuned for one task alone had all
of the steps for it, and is compared with a model that had so too. Models of some corpora's words were asked for those.
Bundles are not calibrated, as only ranks of scores are compared; speakers' scores are normalised by a cohort of
training speakers (AS-norm), as they are where it is served, and EER by cosine is without. No recipe, checkpoint or
threshold was chosen on the split reported here. Minutes of training are by the clock, beside whatever else the machine
did. Each was trained once, and `asc` has six people: a point of difference may be the seed's."""


class Variant(BaseModel):
    """A recipe of `sotto distil`, and what differs from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Path
    changes: dict[str, Any] = Field(default_factory=dict)
    # Whose layers are predicted: the study's teacher, or what has become of it in a row.
    teacher: str = "teacher"

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
    # Exported and timed, nothing more: for models of full size that were trained for some steps only.
    timed_only: bool = False
    # Also measured under every noise and room (`sotto evaluate --robust`).
    grid: bool = False
    # The row that it is compared with: as many steps for the same tasks, but for what the row is to show. Default: the
    # study's reference. Its own name: none.
    against: str = ""
    # Rows of masks with the same word here are meant to be used together, on one backbone.
    together: str = ""


# Against the reference: at least so many percent smaller and faster; at most so many points of accuracy lost and of
# error rate gained.
Mark = Literal["smaller", "faster", "accuracy", "eer"]


class StudyRecipe(BaseModel):
    """The whole file; paths are taken from the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    title: str
    intro: str = ""
    # What its authors read in the figures of the run that is committed; printed under them.
    remarks: str = ""
    teacher: Path  # a recipe of `sotto pretrain`
    distil: dict[str, Variant] = Field(default_factory=dict)
    finetune: Path
    rows: dict[str, RowRecipe] = Field(min_length=1)
    # The row that the others are compared with, and the one that is held against the marks, if any.
    reference: str = "reference"
    student: str = ""
    marks: dict[Mark, float] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Budget:
    """Steps that every recipe of a comparison gets.

    A step of OS-KDFT takes the student through both tasks' audio, so it gets half of their sum: as many passes.
    """

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
        if row.against and row.against not in study.rows:
            raise RecipeError(f"{where}: {name} is compared with {row.against!r}, which is no row")
        if row.bundle is not None:
            continue
        recipe = tuning(study, name)
        if row.init not in known:
            raise RecipeError(f"{where}: row {name} begins with {row.init!r}, which the study does not distil")
        taught_by = study.distil[row.init].teacher if row.init in study.distil else "teacher"
        if taught_by not in known - study.distil.keys():
            raise RecipeError(f"{where}: {row.init} is taught by {taught_by!r}, which is no row above {name}")
        if recipe.mode != "masks":
            known.add(name)
        if row.together:
            like = (recipe.mode, row.init, recipe.masks)
            if recipe.mode != "masks" or together.setdefault(row.together, like) != like:
                raise RecipeError(f"{where}: rows together need `mode: masks`, one init and the same masks; see {name}")
    if study.marks and not study.student:
        raise RecipeError(f"{where}: marks need a row to be held against: student")
    for named in (study.reference, *((study.student,) if study.student else ())):
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
        sections.append(Section(study.title, study.intro, list(study.rows), study.remarks))
    joined = first.model_copy(update={"distil": distil, "rows": rows})
    check_study(joined, "together")
    return joined, sections


def only_rows(
    study: StudyRecipe, sections: Sequence[Section], names: Sequence[str]
) -> tuple[StudyRecipe, list[Section]]:
    """The study cut down to these rows, the reference, and what they begin with or are compared with. Raises
    RecipeError."""
    wanted: set[str] = set()
    queue = [study.reference, *names]
    while queue:
        name = queue.pop()
        if name not in study.rows:
            raise RecipeError(f"there is no row {name!r}; there are {', '.join(study.rows)}")
        wanted.add(name)
        init = study.rows[name].init
        # A row may begin with another one, or with what another one has taught.
        before = study.distil[init].teacher if init in study.distil else init
        queue += [row for row in (before, study.rows[name].against) if row in study.rows and row not in wanted]
    rows = {name: row for name, row in study.rows.items() if name in wanted}
    begun = {row.init for row in rows.values()}
    distil = {name: variant for name, variant in study.distil.items() if name in begun}
    cut = [replace(one, rows=[name for name in one.rows if name in rows]) for one in sections]
    held = {} if study.student in rows else {"student": "", "marks": {}}
    return study.model_copy(update={"rows": rows, "distil": distil, **held}), [one for one in cut if one.rows]


def under(budget: Budget, joined: StudyRecipe) -> StudyRecipe:
    """The joined study with a title and first lines that say what was compared."""
    intro = COMPARED.format(distillation=budget.distillation, finetuning=budget.finetuning)
    return joined.model_copy(update={"title": "Five papers, one teacher, one budget", "intro": intro, "remarks": ""})


def _gather(whole: dict[str, Any], own: Mapping[str, Any], study: str) -> None:
    for name, part in own.items():
        if whole.setdefault(name, part) != part:
            raise RecipeError(f"{study} means something else by {name!r} than a study before it")


def distillation(study: StudyRecipe, name: str, budget: Budget | None = None) -> DistilRecipe:
    """One of the study's distillations. Raises RecipeError."""
    variant = study.distil[name]
    recipe = read_recipe(variant.recipe, DistilRecipe)
    # It keeps its name: what was distilled outside of a study is gone on with in one.
    recipe = _changed(recipe, variant.changes, recipe.name)
    return recipe if budget is None else _with_steps(recipe, budget.distillation)


def tuning(study: StudyRecipe, row: str, budget: Budget | None = None) -> FinetuneRecipe:
    """The study's fine-tuning recipe with the row's changes. Raises RecipeError."""
    recipe = _changed(read_recipe(study.finetune, FinetuneRecipe), study.rows[row].changes, row)
    if budget is None:
        return recipe
    if recipe.one_step is None:
        return _with_steps(recipe, budget.finetuning)
    return _with_steps(recipe, (budget.finetuning + budget.distillation) // 2)


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
    """In 32 bits, whatever the machine: rows that are compared may have been trained on several."""
    schedule = recipe.schedule.model_copy(update={"steps": steps, "precision": "no"})
    return recipe.model_copy(update={"schedule": schedule})
