"""The streams that are open: how many, and their end when the service stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

LOOK_EVERY_S = 0.02


class LiveStreams:
    """Of one process; `gauge` follows their number."""

    def __init__(self, gauge: Gauge) -> None:
        self._count = 0
        self._ending = False
        self._finishes: set[Callable[[], None]] = set()
        gauge.set_function(lambda: self._count)

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a stream's life."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    @contextmanager
    def finishing(self, finish: Callable[[], None]) -> Iterator[None]:
        """Around what can be asked by `finish` to end in good order; it is at once where all were asked before."""
        self._finishes.add(finish)
        if self._ending:
            finish()
        try:
            yield
        finally:
            self._finishes.discard(finish)

    async def finish(self, patience_s: float) -> None:
        """Ask all of them, and those still being accepted when they are; wait so long at most."""
        self._ending = True
        for finish in list(self._finishes):
            finish()
        end = time.monotonic() + patience_s
        while self._count and time.monotonic() < end:
            await asyncio.sleep(LOOK_EVERY_S)
