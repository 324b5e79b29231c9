"""What a study found: figures row by row, as they are stored and as `sotto report` reads them again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.errors import RecipeError
from training.evaluation.report import Figure, Report
from training.files import write_json

FIGURES = "figures.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """One row's figures. What was not measured is absent from `figures`."""

    title: str
    figures: list[Figure]
    det: dict[str, list[tuple[float, float]]]
    error: str = ""
    # The row that it is compared with; default: the reference.
    against: str = ""
    # Where it was trained and measured, and by which revision of the code.
    made_on: str = ""
    revision: str = ""

    def value(self, name: str) -> float:
        return Report("", "", "", self.figures).value(name)


@dataclass(frozen=True, slots=True)
class Section:
    """Some of the rows, under a heading of their own."""

    title: str
    about: str
    rows: list[str]
    remarks: str = ""


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows of masks that share one backbone; sizes in MB, of files as they lie on disk."""

    rows: list[str]
    backbone: float
    masks: list[float]
    heads: list[float]
    # Mean cosine between the masks of two rows, over layers.
    alike: list[tuple[str, str, float]]
    # What that would be of masks that have nothing to do with each other: the share of weights that are on.
    chance: float = 0.0


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
    marks: dict[str, float] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    remarks: str = ""
    # What the times were taken on.
    machine: str = ""

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """Of a study that was run into `folder`. Raises RecipeError where there is none."""
        path = folder / FIGURES
        if not path.is_file():
            raise RecipeError(f"{folder} holds no figures; `sotto study` makes them")
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: measured_of(row) for name, row in stored.pop("rows").items()}
        sections = [Section(**section) for section in stored.pop("sections", [])]
        shared = [shared_of(one) for one in stored.pop("shared", [])]
        return cls(**stored, rows=rows, sections=sections, shared=shared)

    def write(self, folder: Path) -> None:
        write_json(asdict(self), folder / FIGURES)


def measured_of(stored: dict[str, Any]) -> Measured:
    """From what `asdict` made of it."""
    det = {curve: [(float(x), float(y)) for x, y in points] for curve, points in stored["det"].items()}
    return Measured(**{**stored, "figures": [Figure(**figure) for figure in stored["figures"]], "det": det})


def shared_of(stored: dict[str, Any]) -> Shared:
    """From what `asdict` made of it."""
    return Shared(**{**stored, "alike": [(one, other, float(value)) for one, other, value in stored["alike"]]})
