"""Other people's systems on the same recordings, in the environment that `make peers` makes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.beside import check_beside, run_beside
from training.errors import MeasurementError
from training.evaluation.tasks import Trials
from training.evaluation.wake import Found, WakeAudio

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


def pocketsphinx_found(plan: WakeAudio, python: Path) -> list[Found]:
    """PocketSphinx' scores for the plan's words, recording by recording, of what the service is sent. Raises
    MeasurementError."""
    check_beside(python, MeasurementError)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.audio") for number in range(len(plan.audio))]
        for file, item in zip(files, plan.audio, strict=True):
            file.write_bytes(plan.send(item).data)
        # It knows English; words come without their language, and go back with it.
        spoken = {label.split(":", 1)[1]: label for label in plan.words}
        plan_file, found_file = Path(folder, "plan.json"), Path(folder, "found.json")
        plan_file.write_text(json.dumps({"words": list(spoken), "files": [str(file) for file in files]}))
        script = Path(__file__).with_name("pocketsphinx_peer.py")
        run_beside(python, script, plan_file, found_file, failure=MeasurementError)
        found = json.loads(found_file.read_text(encoding="utf-8"))
        return [{spoken[word]: scores for word, scores in one.items()} for one in found]


def _plain(plan: Trials) -> dict[str, object]:
    return {
        "corpus": plan.corpus,
        "speakers": plan.speakers,
        "enrolments": {name: [str(clip.path) for clip in own] for name, own in plan.enrolments.items()},
        "tests": [str(clip.path) for _, clip in plan.tests],
    }
