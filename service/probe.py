"""How many graph calls at once, and with how many threads in each: measured at start, because neither the number
of cores that a machine shows nor ONNX Runtime's defaults tell what is fast in this container.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store.inference import open_session
from service.audio import SAMPLE_RATE_HZ

# Of each candidate, in each round: long enough for a hundred calls of a small graph.
PROBE_S = 0.12
ROUNDS = 2
# Calls side by side need no agreement between threads, so another way has to be better by this much.
CLEARLY_BETTER = 1.1


@dataclass(frozen=True, slots=True)
class Threads:
    """`callers` graph calls at once, with `intra_op` threads in each; `rates` are what the probe saw, in seconds of
    audio each second, by (callers, intra_op)."""

    callers: int
    intra_op: int
    rates: dict[tuple[int, int], float]


def choose_threads(graph: bytes, cpus: int) -> Threads:
    """The fastest of one caller a CPU, one caller alone, and one caller with a thread a CPU. Takes about a second."""
    if cpus == 1:
        return Threads(1, 1, {})
    side_by_side = (cpus, 1)
    candidates = [side_by_side, (1, 1), (1, cpus)]
    sessions = {intra_op: open_session(graph, threads=intra_op) for _, intra_op in candidates}
    feeds: dict[str, npt.NDArray[np.generic]] = {
        "waveform": np.full((1, SAMPLE_RATE_HZ), 0.01, np.float32),
        "lengths": np.array([SAMPLE_RATE_HZ], np.int64),
    }
    counts, seconds = dict.fromkeys(candidates, 0), dict.fromkeys(candidates, 0.0)

    for session in sessions.values():
        session.run(None, feeds)
    for _ in range(ROUNDS):
        for callers, intra_op in candidates:
            session = sessions[intra_op]
            begin = time.perf_counter()
            end = begin + PROBE_S
            done = [0] * callers

            def work(index: int) -> None:
                while time.perf_counter() < end:  # noqa: B023  joined before the next round binds it anew
                    session.run(None, feeds)  # noqa: B023
                    done[index] += 1  # noqa: B023

            threads = [threading.Thread(target=work, args=(index,)) for index in range(callers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            # A slow graph's last calls end long after they were to.
            seconds[callers, intra_op] += time.perf_counter() - begin
            counts[callers, intra_op] += sum(done)
    rates = {candidate: count / seconds[candidate] for candidate, count in counts.items()}
    best = max(rates, key=rates.__getitem__)
    callers, intra_op = best if rates[best] > CLEARLY_BETTER * rates[side_by_side] else side_by_side
    return Threads(callers, intra_op, rates)
