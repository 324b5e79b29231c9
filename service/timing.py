"""How long each stage of one request took: into the histogram and into `Server-Timing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.metrics import STAGES, Metrics


class StageClock:
    """One request's stages: of one that runs twice both count, but what runs at once for several clips counts once."""

    def __init__(self, metrics: Metrics, abandoned: Callable[[], bool] = lambda: False) -> None:
        """`abandoned` says whether whoever asked has gone away."""
        self._metrics = metrics
        self.abandoned = abandoned
        # From and to, of each stage; none overlap, the latest is last.
        self._stretches: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record(name, time.perf_counter() - start)

    def record(self, name: str, duration_s: float) -> None:
        """Count a duration that was measured elsewhere and has ended just now."""
        self._metrics.stages[name].observe(duration_s)
        end = time.perf_counter()
        start = end - duration_s
        stretches = self._stretches.setdefault(name, [])
        while stretches and stretches[-1][1] > start:
            start = min(start, stretches.pop()[0])
        stretches.append((start, end))

    @property
    def durations_s(self) -> dict[str, float]:
        """By stage, as a clock on the wall shows them."""
        return {name: sum(end - start for start, end in own) for name, own in self._stretches.items()}

    def header(self) -> str:
        """The `Server-Timing` value, durations in milliseconds."""
        durations_s = self.durations_s
        return ", ".join(f"{stage};dur={durations_s[stage] * 1e3:.3f}" for stage in STAGES if stage in durations_s)
