"""`make bench`: requests per second on one-second clips, 16 clients, everything on this machine, one run.

Ours, against naive one-process FastAPI handlers around the same graph (three of them, since which is the
best depends on the machine), and against a bare ONNX Runtime loop on the same cores as the ceiling. The
servers run one after the other, in several interleaved rounds; medians are reported.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import soundfile

from model_store import Bundle, LocalStore, builtin_store_path
from model_store.graph import OUTPUTS
from model_store.inference import open_session
from training.evaluation.client import free_port, served

ROUNDS = 3
CLIENTS = 16
BARE_LOOP_S = 6.0
RATE_HZ = 16_000
RESULTS = Path(__file__).with_name("results.md")
NAIVE = {
    "naive, async def, ORT defaults": {"NAIVE_KIND": "async", "NAIVE_THREADS": "0"},
    "naive, async def, 1 thread": {"NAIVE_KIND": "async", "NAIVE_THREADS": "1"},
    "naive, def (thread pool), 1 thread": {"NAIVE_KIND": "def", "NAIVE_THREADS": "1"},
}


def main() -> None:
    bundle = LocalStore(builtin_store_path()).resolve("sotto-edge")
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder, "clip.wav")
        clip.write_bytes(_one_second())
        measured: dict[str, list[dict[str, float]]] = {}
        bare: list[float] = []
        for _ in range(ROUNDS):
            bare.append(_bare_loop(bundle))
            with served(bundle.path) as client:
                port = int(client.url.rsplit(":", 1)[1])
                measured.setdefault("sotto", []).append(_load(port, "/v1/keywords/detect", clip))
            for name, settings in NAIVE.items():
                with _naive(bundle, settings) as port:
                    measured.setdefault(name, []).append(_load(port, "/detect", clip))
    text = _report(bundle, bare, measured)
    print(text)  # noqa: T201  the command's output
    RESULTS.write_text(text, encoding="utf-8")


def _one_second() -> bytes:
    noise = np.random.default_rng(0).standard_normal(RATE_HZ) * 0.05
    stream = io.BytesIO()
    soundfile.write(stream, noise.astype(np.float32), RATE_HZ, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _bare_loop(bundle: Bundle) -> float:
    """Graph calls per second with one caller a core, one session, no HTTP and no decoding."""
    session = open_session(bundle.read(bundle.manifest.graph.file), threads=1)
    feeds = {"waveform": np.full((1, RATE_HZ), 0.01, np.float32), "lengths": np.array([RATE_HZ], np.int64)}
    counts = [0] * len(os.sched_getaffinity(0))
    end = time.perf_counter() + BARE_LOOP_S

    def work(index: int) -> None:
        while time.perf_counter() < end:
            session.run(list(OUTPUTS), feeds)
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / BARE_LOOP_S


def _load(port: int, path: str, clip: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load", str(port), path, str(clip), "--clients", str(CLIENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


@contextmanager
def _naive(bundle: Bundle, settings: dict[str, str]) -> Iterator[int]:
    port = free_port()
    environment = {
        **os.environ,
        **settings,
        "ORT_DISABLE_TELEMETRY": "1",
        "NAIVE_GRAPH": str(bundle.path / bundle.manifest.graph.file),
        "NAIVE_LABELS": "|".join(keyword.label for keyword in bundle.manifest.keywords.labels),
    }
    command = [sys.executable, "-m", "uvicorn", "benchmarks.naive_service:app", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{port}/docs")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _report(bundle: Bundle, bare: list[float], measured: dict[str, list[dict[str, float]]]) -> str:
    ceiling = float(np.median(bare))
    lines = [
        "# One-second clips, 16 clients",
        "",
        f"`make bench`: {bundle.manifest.name}@{bundle.manifest.version}, 16-bit WAV as the raw body, load generator "
        f"on the same {len(os.sched_getaffinity(0))} cores, median of {ROUNDS} interleaved rounds. A bare ONNX Runtime "
        f"loop with one caller a core reaches {ceiling:.0f} calls/s.",
        "",
        "| server | requests/s | of the bare loop | p50 ms | p99 ms | failures |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rounds in measured.items():
        middle = {key: float(np.median([one[key] for one in rounds])) for key in ("requests_per_s", "p50_ms", "p99_ms")}
        failures = sum(one["failures"] for one in rounds)
        lines.append(
            f"| {name} | {middle['requests_per_s']:.0f} | {middle['requests_per_s'] / ceiling:.2f} | "
            f"{middle['p50_ms']:.1f} | {middle['p99_ms']:.1f} | {failures:.0f} |"
        )
    best = max(
        float(np.median([one["requests_per_s"] for one in rounds]))
        for name, rounds in measured.items()
        if name != "sotto"
    )
    ours = float(np.median([one["requests_per_s"] for one in measured["sotto"]]))
    lines += ["", f"sotto against the best naive handler: {ours / best:.2f} times the requests/s.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
