"""How long each stage of one request took: into the histogram and into `Server-Timing`."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from service.metrics import STAGES, Metrics


class StageClock:
    """One request's stages: of one that runs twice both count, but what runs at once for several clips counts once."""

    def __init__(self, metrics: Metrics, abandoned: Callable[[], bool] = lambda: False) -> None:
        """`abandoned` says whether whoever asked has gone away."""
        self._metrics = metrics
        self.abandoned = abandoned
        # From and to, of each stage; none overlap, the latest is last.
        self._stretches: dict[str, list[tuple[float, float]]] = {}

    def stage(self, name: str) -> _Stage:
        """Time the block as stage `name`, however it ends."""
        return _Stage(self, name)

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


class _Stage:
    """A generator with `contextmanager` around it takes three times as long, and every request has three of these."""

    __slots__ = ("_clock", "_name", "_start")

    def __init__(self, clock: StageClock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clock.record(self._name, time.perf_counter() - self._start)
