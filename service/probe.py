"""How many graph calls at once, and with how many threads in each: measured at start, because neither the number
of cores that a machine shows nor ONNX Runtime's defaults tell what is fast in this container.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store.inference import Session
from model_store.whole import open_clips
from service.audio import SAMPLE_RATE_HZ

Feeds = dict[str, npt.NDArray[np.generic]]

# Of each candidate, in each round: long enough for a hundred calls of a small graph.
PROBE_S = 0.08
ROUNDS = 2
# Calls side by side need no agreement between threads, so another way has to be better by this much.
CLEARLY_BETTER = 1.1
# Whoever waits for a full call leaves cores idle, which a probe of the graph does not see: of `sotto-edge@10`,
# served on two cores, calls of one and of eight answer as many, and beside twice as many requests those of one more.
WORTH_WAITING = 1.5
# Few of those that wait anyway may share a call all the same: each call wakes a thread that needs the interpreter, with
# which the event loop is busy. Of `sotto-edge@11`, served on two cores to 16 clients, calls of up to four answer 3
# to 15 % more than calls of one. Unless the graph itself is this much slower where clips share a call.
FEW = 4
SLOWER_TOGETHER = 0.8


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
    sessions = {intra_op: open_clips(graph, threads=intra_op) for _, intra_op in candidates}
    feeds = _seconds(1)
    for session in sessions.values():
        session.run(None, feeds)
    found: dict[tuple[int, int], list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for callers, intra_op in candidates:
            found[callers, intra_op].append(calls_per_s(sessions[intra_op], feeds, callers, PROBE_S))
    rates = {candidate: sum(values) / ROUNDS for candidate, values in found.items()}
    best = max(rates, key=rates.__getitem__)
    callers, intra_op = best if rates[best] > CLEARLY_BETTER * rates[side_by_side] else side_by_side
    return Threads(callers, intra_op, rates)


def clips_a_call(graph: bytes, threads: Threads, most: int) -> int:
    """`most` where so many one-second clips in a call are so much faster than as many calls that it is worth waiting
    for them; otherwise FEW. 1 where they are slower, as where a processor's caches hold what a clip needs and not what
    eight do."""
    if most == 1:
        return 1
    session = open_clips(graph, threads=threads.intra_op)
    rates: dict[int, list[float]] = {1: [], most: []}
    for count in rates:
        session.run(None, _seconds(count))
    for _ in range(ROUNDS):
        for count, found in rates.items():
            found.append(count * calls_per_s(session, _seconds(count), threads.callers, PROBE_S))
    gain = sum(rates[most]) / sum(rates[1])
    return most if gain > WORTH_WAITING else min(FEW, most) if gain > SLOWER_TOGETHER else 1


def standby(callers: int, intra_op: int, cpus: int) -> int:
    """How many of the callers would leave the event loop no core to itself; never all of them."""
    return max(0, min(callers - 1, callers - (cpus - 1) // intra_op))


def calls_per_s(session: Session, feeds: Feeds, callers: int, seconds: float) -> float:
    """What a session does for so many threads that call it without pause."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        calling = [pool.submit(_call_until, begin + seconds, session, feeds) for _ in range(callers)]
        done = sum(one.result() for one in calling)
    # Measured, since a slow graph's last calls end long after they were to.
    return done / (time.perf_counter() - begin)


def _seconds(count: int) -> Feeds:
    """So many one-second clips."""
    return {
        "waveform": np.full((count, SAMPLE_RATE_HZ), 0.01, np.float32),
        "lengths": np.full(count, SAMPLE_RATE_HZ, np.int64),
    }


def _call_until(end: float, session: Session, feeds: Feeds) -> int:
    count = 0
    while time.perf_counter() < end:
        session.run(None, feeds)
        count += 1
    return count
