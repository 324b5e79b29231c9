"""A batcher of numbers, and what its tests hold it up with."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

from service.batching import Batcher
from service.queueing import (
    Limits,
    Priority,
)

FAR = 1e9


class Observer:
    def __init__(self) -> None:
        self.batches: list[int] = []
        self.failures: list[str] = []
        self.drops: list[str] = []
        self.depth = 0

    def batch_run(self, items: int, size: float, area: float, duration_s: float) -> None:  # noqa: ARG002  likewise
        self.batches.append(items)

    def queue_changed(self, items: int, size: float) -> None:  # noqa: ARG002  likewise
        self.depth = items

    def worker_failed(self, kind: str) -> None:
        self.failures.append(kind)

    def dropped(self, reason: str) -> None:
        self.drops.append(reason)


class Gate:
    """A call that records its batches and waits until it is let through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.calls: list[list[float]] = []

    def __call__(self, items: list[float]) -> Sequence[float]:
        self.calls.append(list(items))
        self.entered.release()
        assert self.open.wait(20)
        return [item * 10 for item in items]


@contextmanager
def batcher(
    call: Callable[[list[float]], Sequence[float]],
    *,
    workers: int = 1,
    standby: int = 0,
    max_batch: int = 4,
    max_area: float = 100.0,
    max_waiting: float = 1000.0,
    hang_s: float = 600.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Batcher[float, float], Observer]]:
    observer = Observer()
    made: Batcher[float, float] = Batcher(
        call,
        workers=workers,
        standby=standby,
        limits=Limits(max_batch, max_area, max_waiting, hang_s),
        observer=observer,
        clock=clock,
    )
    try:
        yield made, observer
    finally:
        made.close(5)


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.acquire, timeout=20)


async def queued(observer: Observer, count: int) -> None:
    end = time.monotonic() + 20
    while observer.depth != count:
        assert time.monotonic() < end, f"{observer.depth} items wait, expected {count}"
        await asyncio.sleep(0)


def submit(
    made: Batcher[float, float],
    item: float,
    deadline: float = FAR,
    *,
    group: Hashable = None,
    priority: Priority = Priority.CLIP,
    gather_s: float = 0.0,
    most: int | None = None,
) -> asyncio.Task[float]:
    async def one() -> float:
        timed = await made.submit(
            item, size=item, deadline=deadline, group=group, priority=priority, gather_s=gather_s, most=most
        )
        return timed.value

    return asyncio.ensure_future(one())
