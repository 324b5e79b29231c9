"""Ways to set ONNX Runtime up: callers and threads in each, whether threads spin, whether memory is kept in arenas.

`python -m benchmarks.runtimes GRAPH CALLERS THREADS SPIN ARENA` measures one, in a process of its own, and prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.clients import CPUS, RATE_HZ, ROUNDS, Setting, median
from model_store.graph import part_of
from model_store.inference import session_options
from service.engine import PARTS

MEASURE_S = 1.5
# Clips of other lengths after that, for what stays in memory.
LENGTHS_S, CLIPS = (0.5, 15.0), 300


def runtimes(setting: Setting) -> list[str]:
    """One-second clips through the keyword part of the graph, without HTTP."""
    graph = setting.folder / "keywords.onnx"
    graph.write_bytes(part_of(setting.bundle.read(setting.bundle.manifest.graph.file), PARTS["keywords"]))
    ways = [
        (callers, threads, spin, arena)
        for callers, threads in dict.fromkeys(((CPUS, 1), (1, 1), (1, CPUS), (CPUS, CPUS)))
        for spin in ((False, True) if threads > 1 else (False,))
        for arena in (True, False)
    ]
    found: dict[tuple[int, int, bool, bool], list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.runtimes", str(graph), *(str(int(each)) for each in way)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout))
    rows = []
    for (callers, threads, spin, arena), each in found.items():
        rate, core_ms, p99_ms, megabytes = (
            median(one[name] for one in each) for name in ("rate", "core_ms", "p99_ms", "megabytes")
        )
        ways_said = f"{callers} | {threads} | {'yes' if spin else 'no'} | {'yes' if arena else 'no'}"
        rows.append(f"| {ways_said} | {rate:.0f} | {core_ms:.2f} | {p99_ms:.2f} | {megabytes:.0f} |")
    return [
        "## runtimes",
        "",
        f"Graph calls on one-second clips, without a service; medians of {ROUNDS} rounds, each in a process of its "
        "own. Callers are threads that call one shared session. "
        f"Memory is what the process has at most after {CLIPS} more clips of {LENGTHS_S[0]:g} to {LENGTHS_S[1]:g} s. "
        "What is served: callers and threads as a probe at start finds them, nothing spins, arenas are kept.",
        "",
        "| callers | threads each | spinning | arena | calls/s | ms of a core a call | p99 ms | MB |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |",
        *rows,
    ]


def measured(graph: Path, callers: int, threads: int, spin: bool, arena: bool) -> dict[str, float]:
    """Of one way."""
    content = graph.read_bytes()
    options = session_options(content, threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.enable_cpu_mem_arena = arena
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    one = _feeds(1.0)
    for _ in range(20):
        session.run(None, one)
    begin, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(callers) as pool:
        calling = [pool.submit(_call_until, begin + MEASURE_S, session, one) for _ in range(callers)]
        times_s = [taken for future in calling for taken in future.result()]
    took_s, used_s = time.perf_counter() - begin, time.process_time() - used
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda seconds: session.run(None, _feeds(seconds)), rng.uniform(*LENGTHS_S, CLIPS)))
    return {
        "rate": len(times_s) / took_s,
        "core_ms": 1e3 * used_s / len(times_s),
        "p99_ms": float(np.percentile(times_s, 99) * 1e3),
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def _feeds(seconds: float) -> dict[str, Any]:
    samples = int(seconds * RATE_HZ)
    return {"waveform": np.full((1, samples), 0.01, np.float32), "lengths": np.array([samples], np.int64)}


def _call_until(end: float, session: Any, feeds: dict[str, Any]) -> list[float]:
    times_s = []
    while (start := time.perf_counter()) < end:
        session.run(None, feeds)
        times_s.append(time.perf_counter() - start)
    return times_s


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    given = [int(number) for number in numbers]
    print(json.dumps(measured(Path(path), given[0], given[1], bool(given[2]), bool(given[3]))))  # noqa: T201  the output
    sys.stdout.flush()
    os._exit(0)
