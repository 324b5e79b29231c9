"""Scripts in the environment that `make peers` makes: what they need does not go with this project's own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from training.errors import TrainingError

# By default glibc hands each freed tensor back to the system, which then clears it page by page for the next one.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_MMAP_THRESHOLD_": str(2**31)}


def check_beside(python: Path, failure: type[TrainingError]) -> None:
    """Raises `failure` where the environment has not been made."""
    if not python.exists():
        raise failure(f"{python} does not exist; `make peers` makes it, with other people's systems in it")


def run_beside(python: Path, script: Path, *arguments: Path, failure: type[TrainingError]) -> None:
    """Run a script to its end. Raises `failure`, with the last of what it complained of."""
    check_beside(python, failure)
    command = [str(python), str(script), *map(str, arguments)]
    environment = {**os.environ, **KEEP_FREED_MEMORY}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise failure(f"{script.name} failed:\n{done.stderr[-2000:]}")
