"""A study as one Markdown page with plots: what `sotto report` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from training.evaluation.plots import draw_into
from training.evaluation.report import Report
from training.evaluation.robust import NOISY, REVERBERANT, robustness_table
from training.outcome import Measured, Outcome, Shared

ACCURACY, EER = "keywords top-1", "sv EER"
TRUNK = "trunk alone, one thread"
ONE_THREAD, ALL_THREADS = "one second of audio, one thread", "one second of audio, all threads"
# (heading, figure, decimals)
COLUMNS = (
    ("keywords, %", ACCURACY, 2),
    ("`asc`, %", "asc top-1", 2),
    ("`commands`, %", "commands top-1", 2),
    ("SV EER, %", EER, 2),
    ("by cosine, %", "sv, cosine EER", 2),
    ("minDCF", "sv minDCF(0.01)", 3),
    ("Cllr", "sv Cllr", 3),
    ("`asc` at 10 dB, %", f"asc top-1, {NOISY}", 2),
    ("SV EER at 10 dB, %", f"sv EER, {NOISY}", 2),
    ("parameters, M", "parameters", 2),
    ("with training heads, M", "parameters, training heads included", 2),
    ("file, MB", "file", 2),
    ("MACs/s, M", "multiply-accumulates", 0),
    ("1 s on 1 thread, ms", ONE_THREAD, 2),
    ("1 s on all, ms", ALL_THREADS, 2),
    ("trunk alone, ms", TRUNK, 2),
    ("passes", "passes", 0),
    ("distillation loss, first tenth of steps", "distillation loss, first tenth", 3),
    ("and last tenth", "distillation loss, last tenth", 3),
    ("training, min", "training", 0),
)
# Points lost at 10 dB of unseen noise: (heading, figure, and by which sign a loss is one).
LOSSES = (("`asc` lost at 10 dB", "asc top-1", -1), ("EER gained at 10 dB", EER, 1))
DET_TICKS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
# Matplotlib has so many colours in turn; then the next marker or line.
COLOURS = 10
MARKERS, LINES = "osD^v", ("-", "--", ":", "-.")
NORMAL = NormalDist()
ABSENT = "-"


def write_page(outcome: Outcome, page: Path) -> None:
    """`page` and, beside it, its plots as PNG files named after it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    curves = any(row.det.get("sv") for row in outcome.rows.values())
    heard = any(math.isfinite(row.value(ACCURACY)) for row in outcome.rows.values())
    plots = [
        *([("det", "Misses against false accepts", _det(outcome))] if curves else []),
        *(
            [
                ("size", "Keyword accuracy against size", _against(outcome, "parameters", "parameters, M")),
                (
                    "latency",
                    "Keyword accuracy against latency",
                    _against(outcome, ONE_THREAD, "one second on one thread, ms"),
                ),
            ]
            if heard
            else []
        ),
        *([("masks", "How alike masks are", _alike(outcome.shared))] if outcome.shared else []),
    ]
    lines = [f"# {outcome.title}", ""]
    if outcome.intro:
        lines += [outcome.intro.strip(), ""]
    where = f"on the {outcome.split} split, through HTTP, " if curves or heard else ""
    lines += [f"Measured {where}by", "", f"    {outcome.command}", ""]
    if where:
        lines += ["No weight, checkpoint, threshold or calibration was fitted or selected on that split.", ""]
    lines += [
        *table(outcome),
        "",
        *explained(outcome),
        *made_on(outcome),
        *([] if outcome.sections else comparison(outcome)),
        *marks(outcome),
    ]
    if outcome.remarks:
        lines += ["", "## What the run that is committed showed", "", outcome.remarks.strip()]
    for section in outcome.sections:
        lines += ["", f"## {section.title}", ""]
        lines += [section.about.strip(), ""] if section.about else []
        lines += table(outcome, section.rows)
        lines += comparison(outcome, section.rows)
        lines += ["", section.remarks.strip()] if section.remarks else []
        lines += [line for name in section.rows for line in grid(outcome.rows[name])]
    lines += [line for one in outcome.shared for line in shared(outcome, one)]
    for name, title, draw in plots:
        file = page.with_name(f"{page.stem}-{name}.png")
        # As high as the list of names beside it.
        draw_into(file, partial(_alone, draw), size=(7.6, max(4.4, 0.6 + 0.155 * len(outcome.rows))))
        lines += ["", f"## {title}", "", f"![{title}]({file.name})"]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(outcome: Outcome, names: Sequence[str] | None = None) -> list[str]:
    """One line for each row, or for those named; one column for each figure that any of them has."""
    rows = [row for name, row in outcome.rows.items() if names is None or name in names]
    columns = [one for one in COLUMNS if any(math.isfinite(row.value(one[1])) for row in rows)]
    lines = [
        "| | " + " | ".join(heading for heading, _, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.title} | " + " | ".join([f"failed: {_plain(row.error)}"] + [""] * (len(columns) - 1)))
            lines[-1] += " |"
            continue
        lines.append(f"| {row.title} | " + " | ".join(_cell(row, name, places) for _, name, places in columns) + " |")
    return lines


def explained(outcome: Outcome) -> list[str]:
    """What the table's columns mean, those that it has."""
    given = {figure.name for row in outcome.rows.values() for figure in row.figures}
    said = []
    if any("interval" in figure.detail for row in outcome.rows.values() for figure in row.figures):
        said.append("Intervals are 95 % (Wilson).")
    if "parameters, training heads included" in given:
        said.append("`with training heads` counts what the last run of each left behind at export.")
    if "passes" in given:
        said.append("`passes` are batches of audio that went through the student, distillation included.")
    if outcome.machine:
        said.append(f"Times are medians for one second of audio, a batch of one, on {outcome.machine}.")
    if TRUNK in given:
        said.append("`trunk alone` is without any head.")
    return [*said, ""] if said else []


def made_on(outcome: Outcome) -> list[str]:
    """Which rows were trained and measured where, if not all in one place."""
    places: dict[str, list[Measured]] = {}
    for row in outcome.rows.values():
        if row.made_on:
            places.setdefault(row.made_on, []).append(row)
    if len(places) < 2:
        return []
    code = {place: dict.fromkeys(row.revision[:7] for row in rows if row.revision) for place, rows in places.items()}
    return [
        "Rows were trained and measured on several machines, each of which made distillations of its own; minutes of "
        "training compare within one of them only.",
        "",
        *(
            f"* {place}{', code of ' if code[place] else ''}{', '.join(code[place])}: "
            f"{'; '.join(row.title for row in rows)}."
            for place, rows in places.items()
        ),
        "",
    ]


def comparison(outcome: Outcome, names: Sequence[str] | None = None) -> list[str]:
    """Every row, or each of those named, against the one that it is to be compared with, in the paper's terms."""
    pairs, lost = [], []
    for name, row in outcome.rows.items():
        other = outcome.rows.get(row.against or outcome.reference)
        if other is None or other is row or row.error or (names is not None and name not in names):
            continue
        if other.error:
            lost += ["", f"{other.title} failed, so {row.title} is not compared with it."]
        else:
            pairs.append((row, other))
    if not pairs:
        return lost
    columns: list[tuple[str, Callable[[Measured, Measured], str]]] = [
        ("against", lambda _, other: other.title),
        ("smaller by", partial(_saved, figure="parameters")),
        ("fewer MACs by", partial(_saved, figure="multiply-accumulates")),
        ("faster by (one thread)", partial(_saved, figure=ONE_THREAD)),
        ("accuracy, points", partial(_change, figure=ACCURACY)),
        ("`asc`, points", partial(_change, figure="asc top-1")),
        ("`commands`, points", partial(_change, figure="commands top-1")),
        ("EER, points", partial(_change, figure=EER)),
        *((heading, partial(_lost, figure=figure, sign=sign)) for heading, figure, sign in LOSSES),
    ]
    cells = [[tell(row, other) for _, tell in columns] for row, other in pairs]
    told = [number for number in range(len(columns)) if any(line[number] != ABSENT for line in cells)]
    return [
        "",
        f"{'##' if names is None else '###'} Compared",
        "",
        "| | " + " | ".join(columns[number][0] for number in told) + " |",
        "| --- | --- |" + " ---: |" * (len(told) - 1),
        *(
            f"| {row.title} | " + " | ".join(line[number] for number in told) + " |"
            for (row, _), line in zip(pairs, cells, strict=True)
        ),
        *lost,
    ]


def marks(outcome: Outcome) -> list[str]:
    """Whether the student reaches what it was meant to, one line for each mark."""
    if not outcome.marks:
        return []
    reference, student = outcome.rows[outcome.reference], outcome.rows[outcome.student]
    if reference.error or student.error:
        return []
    size, time = (student.value(name) / reference.value(name) for name in ("parameters", ONE_THREAD))
    found = {
        "smaller": ("parameters, % fewer", (1 - size) * 100, 1),
        "faster": ("time on one thread, % less", (1 - time) * 100, 1),
        "accuracy": ("accuracy lost, points", reference.value(ACCURACY) - student.value(ACCURACY), -1),
        "eer": ("EER gained, points", student.value(EER) - reference.value(EER), -1),
    }
    lines = ["", f"## Marks for the {student.title}", "", "| | mark | found | |", "| --- | ---: | ---: | --- |"]
    for name, mark in outcome.marks.items():
        what, value, sign = found[name]
        bound, verdict = ("at least" if sign > 0 else "at most"), ("met" if sign * value >= sign * mark else "missed")
        lines.append(f"| {what} | {bound} {mark:g} | {value:.2f} | {verdict} |")
    return lines


def grid(row: Measured) -> list[str]:
    """A row's figures in noise and rooms, where it was measured in more than one."""
    found = robustness_table(Report("", "", "", row.figures))
    if not any(line.startswith(f"| {REVERBERANT} |") for line in found):
        return []
    return ["", f"In noise and rooms: {row.title}", "", *found]


def shared(outcome: Outcome, found: Shared) -> list[str]:
    """What several tasks on one backbone take, and how alike their masks are."""
    titles = [outcome.rows[name].title for name in found.rows]
    lines = [
        "",
        "## One backbone, a mask and heads for each task",
        "",
        "| | mask, MB | heads, MB |",
        "| --- | ---: | ---: |",
    ]
    for title, mask, heads in zip(titles, found.masks, found.heads, strict=True):
        lines.append(f"| {title} | {mask:.3f} | {heads:.3f} |")
    together = found.backbone + sum(found.masks) + sum(found.heads)
    apart = len(found.rows) * found.backbone + sum(found.heads)
    lines += [
        "",
        f"The backbone is {found.backbone:.2f} MB: {together:.2f} MB for all of them together, {apart:.2f} MB for "
        f"{len(found.rows)} students of their own, {(1 - together / apart) * 100:.1f} % less.",
        "",
        f"Masks that have nothing to do with each other would have a cosine of {found.chance:.3f}.",
        "",
        "| masks of | and of | mean cosine |",
        "| --- | --- | ---: |",
        *(
            f"| {outcome.rows[one].title} | {outcome.rows[other].title} | {value:.3f} |"
            for one, other, value in found.alike
        ),
    ]
    return lines


def _cell(row: Measured, name: str, places: int) -> str:
    value = row.value(name)
    if not math.isfinite(value):
        return ABSENT
    text = f"{value:.{places}f}"
    detail = next(figure.detail for figure in row.figures if figure.name == name)
    interval = detail.split(";")[0].removeprefix("95 % interval ").split(",")[0]
    return f"{text} ({interval})" if "95 % interval" in detail else text


def _saved(row: Measured, reference: Measured, figure: str) -> str:
    share = 1 - row.value(figure) / reference.value(figure)
    return f"{share * 100:.1f} %" if math.isfinite(share) else ABSENT


def _lost(row: Measured, other: Measured, figure: str, sign: int) -> str:
    """What noise takes from each of them."""
    own, theirs = (sign * (one.value(f"{figure}, {NOISY}") - one.value(figure)) for one in (row, other))
    return f"{own:.2f}, not {theirs:.2f}" if math.isfinite(own) and math.isfinite(theirs) else ABSENT


def _change(row: Measured, reference: Measured, figure: str) -> str:
    change = row.value(figure) - reference.value(figure)
    return f"{change:+.2f}" if math.isfinite(change) else ABSENT


def _plain(error: str) -> str:
    return error.splitlines()[0].replace("|", "/")[:120]


def _alone(draw: Callable[[Any], None], figure: Any) -> None:
    draw(figure.add_subplot())


def _det(outcome: Outcome) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for row in outcome.rows.values():
            points = row.det.get("sv", [])
            if points:
                accepts, misses = ([NORMAL.inv_cdf(rate) for rate in rates] for rates in zip(*points, strict=True))
                style = LINES[len(axes.lines) // COLOURS % len(LINES)]
                axes.plot(accepts, misses, style, label=row.title, linewidth=1.2)
        places = [NORMAL.inv_cdf(tick) for tick in DET_TICKS]
        names = [f"{tick * 100:g}" for tick in DET_TICKS]
        axes.set_xticks(places, names)
        axes.set_yticks(places, names)
        axes.set_xlim(places[0], places[-1])
        axes.set_ylim(places[0], places[-1])
        axes.set_xlabel("false accepts, %")
        axes.set_ylabel("misses, %")
        axes.grid(alpha=0.3)
        _name(axes)

    return draw


def _against(outcome: Outcome, figure: str, label: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        for number, (title, x, y) in enumerate(_points(outcome.rows.values(), figure)):
            axes.scatter([x], [y], s=24, marker=MARKERS[number // COLOURS % len(MARKERS)], label=title)
        axes.set_xscale("log")
        # Powers of ten are too far apart for what is compared here.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("keyword accuracy, %")
        axes.grid(alpha=0.3)
        _name(axes)

    return draw


def _name(axes: Any) -> None:
    """Beside the plot, where two dozen rows do not hide what they name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _alike(groups: Sequence[Shared]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        found = groups[0]
        places = {name: place for place, name in enumerate(found.rows)}
        cosines = np.eye(len(places))
        for one, other, value in found.alike:
            cosines[places[one], places[other]] = cosines[places[other], places[one]] = value
        axes.imshow(cosines, cmap="Blues", vmax=1.0)
        axes.set_xticks(range(len(places)), found.rows, fontsize=7)
        axes.set_yticks(range(len(places)), found.rows, fontsize=7)
        for (row, column), value in np.ndenumerate(cosines):
            colour = "white" if row == column else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=7, color=colour)

    return draw


def _points(rows: Sequence[Measured] | Any, figure: str) -> list[tuple[str, float, float]]:
    found = [(row.title, row.value(figure), row.value(ACCURACY)) for row in rows]
    return [point for point in found if math.isfinite(point[1]) and math.isfinite(point[2])]
