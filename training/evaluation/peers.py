"""Other people's systems on the same recordings, in the environment that `make peers` makes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.beside import run_beside
from training.errors import MeasurementError
from training.evaluation.tasks import Trials

DEFAULT_PEERS_PYTHON = Path(".venv-peers/bin/python")


def resemblyzer_scores(plans: Sequence[Trials], python: Path) -> list[npt.NDArray[np.float64]]:
    """Cosines shaped like each plan's `llr`. Raises MeasurementError."""
    with tempfile.TemporaryDirectory() as folder:
        plan_file, score_file = Path(folder, "plan.json"), Path(folder, "scores.npz")
        plan_file.write_text(json.dumps([_plain(plan) for plan in plans]), encoding="utf-8")
        script = Path(__file__).with_name("resemblyzer_peer.py")
        run_beside(python, script, plan_file, score_file, failure=MeasurementError)
        with np.load(score_file) as scores:
            return [scores[plan.corpus].astype(np.float64) for plan in plans]


def _plain(plan: Trials) -> dict[str, object]:
    return {
        "corpus": plan.corpus,
        "speakers": plan.speakers,
        "enrolments": {name: [str(clip.path) for clip in own] for name, own in plan.enrolments.items()},
        "tests": [str(clip.path) for _, clip in plan.tests],
    }
