"""What all measurements share: clips to send, our load generator, and where things lie."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.load import Result
from benchmarks.servers import Server
from model_store import Bundle

ROUNDS = 3
CLIENTS = 16
RATE_HZ = 16_000
CPUS = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured, where clips lie, and how long the long ones take."""

    bundle: Bundle
    folder: Path
    soak_s: float
    moves: int
    plots: Path


def clip(folder: Path, seconds: float, name: str) -> Path:
    """A WAV file of noise: what is said makes no difference to time."""
    path = folder / f"{name}.wav"
    noise = np.random.default_rng(0).standard_normal(int(seconds * RATE_HZ)) * 0.05
    soundfile.write(path, noise.astype(np.float32), RATE_HZ, subtype="PCM_16")
    return path


def load(server: Server, files: Sequence[Path], **options: float) -> Result:
    """Our load generator, in a process of its own."""
    wrapped = []
    for file in files:
        # The same file again is the same kind.
        own = file.with_suffix(".body") if server.json_body else file
        if server.json_body:
            own.write_bytes(server.body(file.read_bytes()))
        wrapped.append(str(own))
    command = [sys.executable, "-m", "benchmarks.load", str(server.port), server.detect, *wrapped]
    command += ["--content-type", server.content_type]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Result.from_json(done.stdout)


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for clips."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
