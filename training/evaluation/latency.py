"""What one second of audio costs in ONNX Runtime, alone on one thread and with all of them."""

from __future__ import annotations

import time

import numpy as np

from model_store import Bundle
from model_store.graph import OUTPUTS
from model_store.inference import open_session
from training.audio_cache import SAMPLE_RATE_HZ

WARM_UP_RUNS, TIMED_RUNS = 30, 300


def latency_ms(bundle: Bundle, threads: int) -> float:
    """Median time of one call on one second of noise, in milliseconds."""
    session = open_session(bundle.read(bundle.manifest.graph.file), threads=threads)
    noise = np.random.default_rng(0).standard_normal((1, SAMPLE_RATE_HZ)).astype(np.float32) * np.float32(0.05)
    feeds = {"waveform": noise, "lengths": np.array([SAMPLE_RATE_HZ], dtype=np.int64)}
    times = []
    for run in range(WARM_UP_RUNS + TIMED_RUNS):
        start = time.perf_counter()
        session.run(list(OUTPUTS), feeds)
        if run >= WARM_UP_RUNS:
            times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)
