"""What noise and rooms cost: accuracy and error rates over a grid of conditions that training never heard.

Noises are those of the reported split; rooms are its recorded ones and simulated ones of known reverberation
time that no training can draw. Speakers enrol with recordings as they are: what is measured is how
a disturbed test compares with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from training.audio_cache import Waveform, decode
from training.calibrate import TASKS
from training.errors import MeasurementError
from training.evaluation.client import ServiceClient, Upload
from training.evaluation.plots import draw_into
from training.evaluation.recordings import disturbed
from training.evaluation.report import Figure, Report
from training.evaluation.tasks import clip_accuracy, plan_trials, run_trials, verification
from training.manifest import Clip, Data, Recording
from training.rooms import Room, evaluation_rooms

LEVELS_DB = (None, 20.0, 10.0, 5.0, 0.0)
# What the simulated rooms are asked for; the figures name what they have.
T60_S = (0.3, 0.6, 0.9)
DRY, REVERBERANT = "dry", "reverberant"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Condition:
    """Noise at a level or none, and the rooms of which each clip gets one."""

    place: str
    snr_db: float | None
    rooms: tuple[Waveform, ...]

    @property
    def name(self) -> str:
        return f"{self.place}, {level_name(self.snr_db)}"


def level_name(snr_db: float | None) -> str:
    return "no noise" if snr_db is None else f"{snr_db:g} dB"


# What every row of a comparison is measured under, beside the recordings as they are.
NOISY = f"{DRY}, {level_name(10.0)}"


def conditions(data: Data, split: str) -> list[Condition]:
    """Dry and reverberant at each level, and each simulated room alone without noise."""
    simulated = _simulated()
    recorded = [decode(room.path) for room in data.rooms if room.split == split]
    everywhere = (*recorded, *(room.response for room in simulated))
    return [
        *(Condition(DRY, level, ()) for level in LEVELS_DB),
        *(Condition(REVERBERANT, level, everywhere) for level in LEVELS_DB),
        *(Condition(f"T60 {room.t60_s:.2f} s", None, (room.response,)) for room in simulated),
    ]


@cache
def _simulated() -> tuple[Room, ...]:
    return tuple(evaluation_rooms(T60_S))


def evaluate_robustness(
    client: ServiceClient,
    data: Data,
    *,
    split: str,
    command: str,
    say: Say,
    tasks: Sequence[str] = TASKS,
    only: Sequence[str] | None = None,
) -> Report:
    """`asc` and `sv`, as far as they are among the `tasks`, under every condition or those named in `only`.

    Raises MeasurementError where the split has no noise or a condition does not exist.
    """
    everything = conditions(data, split)
    unknown = set(only or ()) - {condition.name for condition in everything}
    if unknown:
        raise MeasurementError(f"there is no condition {', '.join(sorted(unknown))}")
    noises = [noise for noise in data.noises if noise.split == split]
    if not noises:
        raise MeasurementError(f"there is no noise of the {split} split in noise.csv")
    model = client.model()
    report = Report(f"{model['name']}@{model['version']}", split, command)
    known = set(client.keywords()) if "keywords" in tasks else set()
    spoken = [clip for clip in data.split(split) if clip.corpus == "asc" and clip.label in known]
    for condition in everything:
        if only is not None and condition.name not in only:
            continue
        say(f"measuring {condition.name}")

        def send(clip: Clip | Recording, condition: Condition = condition) -> Upload:
            assert isinstance(clip, Clip)  # noises are sent as they are
            return disturbed(clip, noises, condition.snr_db, condition.rooms)

        if spoken:
            found = clip_accuracy(client, spoken, send)
            low, high = found.overall.interval
            detail = f"95 % interval {low * 100:.1f} to {high * 100:.1f}, n = {found.overall.total}"
            report.figures.append(Figure(f"asc top-1, {condition.name}", found.overall.value * 100, "%", detail))
        plans = plan_trials(data.split(split)) if "speakers" in tasks else []
        for plan in plans:
            run_trials(client, plan, send)
        if plans:
            scores = verification(plans, [plan.llr for plan in plans])
            detail = f"{scores.targets} target and {scores.impostors} impostor trials"
            report.figures.append(Figure(f"sv EER, {condition.name}", scores.eer * 100, "%", detail))
    return report


def write_robustness_page(report: Report, page: Path) -> None:
    """The grid as tables, and beside the page as a heat map."""
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    draw_into(picture, lambda figure: _heat_maps(figure, report), size=(7.6, 3.0))
    lines = [
        f"# {report.model} in noise and rooms",
        "",
        f"Measured on the {report.split} split, through HTTP, by",
        "",
        f"    {report.command}",
        "",
        *(["Noises and rooms were in no training."] if report.split == "dev" else []),
        "`reverberant` draws one of all the rooms for each clip; the rows",
        "with a reverberation time are one simulated room each. Speakers enrolled without noise or room.",
        "",
        *robustness_table(report),
        "",
        f"![Losses against the recordings as they are]({picture.name})",
    ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def robustness_table(report: Report) -> list[str]:
    """Markdown: a line for each place, columns for each task and level; absent is what was not measured."""
    lines = []
    for task, heading in (("asc top-1", "`asc`, %"), ("sv EER", "SV EER, %")):
        places = _places(report, task)
        if not places:
            continue
        lines += [
            f"| {heading} | " + " | ".join(level_name(level) for level in LEVELS_DB) + " |",
            "| --- |" + " ---: |" * len(LEVELS_DB),
            *(f"| {place} | " + " | ".join(map(_cell, _row(report, task, place))) + " |" for place in places),
            "",
        ]
    return lines[:-1]


def _row(report: Report, task: str, place: str) -> list[float]:
    return [report.value(f"{task}, {place}, {level_name(level)}") for level in LEVELS_DB]


def _places(report: Report, task: str) -> list[str]:
    levels = {level_name(level) for level in LEVELS_DB}
    # Other figures of the task name a corpus or a speaker.
    names = [figure.name for figure in report.figures if figure.name.startswith(f"{task}, ")]
    parts = [name.removeprefix(f"{task}, ").rsplit(", ", 1) for name in names]
    return list(dict.fromkeys(part[0] for part in parts if part[-1] in levels and len(part) == 2))


def _cell(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"


def _heat_maps(figure: Any, report: Report) -> None:
    tasks: Sequence[tuple[str, str, float]] = (
        ("asc top-1", "asc accuracy lost, points", -1.0),
        ("sv EER", "SV EER gained, points", 1.0),
    )
    for axes, (task, title, sign) in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        places = _places(report, task)
        clean = report.value(f"{task}, {DRY}, {level_name(None)}")
        losses = np.array([[sign * (value - clean) for value in _row(report, task, place)] for place in places])
        axes.set_title(title, fontsize=8)
        if not places:
            continue
        axes.imshow(losses, cmap="Reds", vmin=0.0, aspect="auto")
        axes.set_xticks(range(len(LEVELS_DB)), [level_name(level) for level in LEVELS_DB], fontsize=6)
        axes.set_yticks(range(len(places)), places, fontsize=6)
        for (row, column), loss in np.ndenumerate(losses):
            if np.isfinite(loss):
                axes.text(column, row, f"{loss:.1f}", ha="center", va="center", fontsize=6)
