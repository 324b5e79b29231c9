"""How long each stage of one request took: into the histogram and into `Server-Timing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.metrics import STAGES, Metrics


class StageClock:
    """One request's stage durations in seconds; a stage that runs twice adds up."""

    def __init__(self, metrics: Metrics, abandoned: Callable[[], bool] = lambda: False) -> None:
        """`abandoned` says whether whoever asked has gone away."""
        self._metrics = metrics
        self.abandoned = abandoned
        self.durations_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record(name, time.perf_counter() - start)

    def record(self, name: str, duration_s: float) -> None:
        """Count a duration that was measured elsewhere."""
        self.durations_s[name] = self.durations_s.get(name, 0.0) + duration_s
        self._metrics.stages[name].observe(duration_s)

    def header(self) -> str:
        """The `Server-Timing` value, durations in milliseconds."""
        return ", ".join(
            f"{stage};dur={self.durations_s[stage] * 1e3:.3f}" for stage in STAGES if stage in self.durations_s
        )
