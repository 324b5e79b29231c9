"""Scripts in the environment that `make peers` makes: what they need does not go with this project's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from training.errors import TrainingError


def check_beside(python: Path, failure: type[TrainingError]) -> None:
    """Raises `failure` where the environment has not been made."""
    if not python.exists():
        raise failure(f"{python} does not exist; `make peers` makes it, with Resemblyzer in it")


def run_beside(python: Path, script: Path, *arguments: Path, failure: type[TrainingError]) -> None:
    """Run one of Resemblyzer's scripts to its end. Raises `failure`, with the last of what it complained of."""
    check_beside(python, failure)
    done = subprocess.run([str(python), str(script), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise failure(f"Resemblyzer failed:\n{done.stderr[-2000:]}")
