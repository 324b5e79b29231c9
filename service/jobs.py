"""What the batcher runs: clips through an engine, and chunks of streams through its streaming graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store.streaming import Chunk, Progress, StreamingGraph
from service.audio import Waveform
from service.engine import Engine, Outputs, Part
from service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Job:
    """One clip and what is wanted of it."""

    engine: Engine
    part: Part
    waveform: Waveform


@dataclass(frozen=True, slots=True)
class Step:
    """The next chunk of one stream."""

    graph: StreamingGraph
    chunk: Chunk


# What a step gives: logits [T, K], and how far the stream is then.
Advanced = tuple[npt.NDArray[np.float32], Progress]


def run_batch(batch: list[Job | Step]) -> Sequence[Outputs | Advanced]:
    """Of one group: the same engine, and the same part or chunks of the same length."""
    first = batch[0]
    if isinstance(first, Step):
        return first.graph.run([step.chunk for step in batch if isinstance(step, Step)])
    return first.engine.run([job.waveform for job in batch if isinstance(job, Job)], first.part)


class BatchObserver:
    """Reports the batcher into the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def batch_run(self, items: int, size: float, area: float, duration_s: float) -> None:  # noqa: ARG002  stages time it
        self._metrics.batch_size.observe(items)
        self._metrics.padded_seconds.inc(area - size)

    def queue_changed(self, items: int, size: float) -> None:
        self._metrics.queue_depth.set(items)
        self._metrics.queued_audio.set(size)

    def worker_failed(self, kind: str) -> None:
        self._metrics.worker_failures.labels(kind).inc()

    def dropped(self, reason: str) -> None:
        self._metrics.dropped.labels(reason).inc()
