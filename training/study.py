"""A study: one teacher, students made from it in several ways, all measured on the same data in one run.

`sotto study FILE` trains what is missing (every step resumes where it was stopped), measures each row
through HTTP, times all graphs side by side, and writes one page. `sotto compare FILES` does the same for
several studies of one teacher together, under one budget. A row that fails is said to have failed; the
others go on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from model_store.graph import part_of
from training.errors import RecipeError
from training.evaluation.cost import latencies_ms, machine, multiply_accumulates
from training.evaluation.report import Figure
from training.files import write_json
from training.outcome import Measured, Outcome, Section, Shared
from training.plan import StudyRecipe
from training.rows import Rows, Setting

# The graph's output behind which no head stands.
FRAMES = "frames"


def run_study(study: StudyRecipe, setting: Setting, sections: Sequence[Section] = ()) -> Outcome:
    """Train and measure what has not been, and return everything. Raises TrainingError where the teacher fails or
    the folder is of another budget; a distillation or row that fails is recorded."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    _claim(setting)
    made = Rows(study, setting)
    made.teacher()
    rows: dict[str, Measured] = {}
    graphs: dict[str, bytes] = {}
    left = list(study.rows)
    while left:
        # What another process is at work on comes later.
        name = next((name for name in left if not made.is_taken(name)), left[0])
        left.remove(name)
        row = study.rows[name]
        try:
            rows[name] = made.measured(name)
        # Whatever one row dies of, hours of the others' work are not to be lost to it.
        except Exception as error:
            setting.say(f"{name} failed: {error}")
            rows[name] = Measured(row.title, [], {}, f"{type(error).__name__}: {error}", row.against)
    for name in (name for name in study.rows if not rows[name].error):
        # For a look at some rows it is not worth making the network of others.
        if made.is_here(name) or not setting.part:
            try:
                graphs[name] = made.graph(name)
            # Its other figures stay.
            except Exception as error:
                setting.say(f"{name} is not timed: {error}")
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
        {name: rows[name] for name in study.rows},
        {str(name): value for name, value in study.marks.items()},
        list(sections),
        _shared(made, list(graphs), setting),
        study.remarks,
        machine(),
    )
    if not setting.part:
        outcome.write(setting.folder)
    return outcome


def _shared(made: Rows, names: Sequence[str], setting: Setting) -> list[Shared]:
    try:
        return made.shared(names)
    # As for a row.
    except Exception as error:
        setting.say(f"what is shared is not told: {error}")
        return []


def _claim(setting: Setting) -> None:
    """One folder, one budget: under another one nothing in it could go on. Raises RecipeError."""
    budget = None if setting.budget is None else asdict(setting.budget)
    path = setting.folder / "budget.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != budget:
        raise RecipeError(f"{setting.folder} holds a comparison under another budget; give --run another folder")
    write_json(budget, path)
