"""The dynamic batcher: turns single submissions into batched calls. Knows nothing of audio or HTTP.

A worker that is free takes the oldest item at once, together with waiting items of similar size; what
arrives while all workers are busy waits and is batched by the next free one. So an idle service adds no
delay and a busy one fills its batches by itself.

Every item ends in exactly one outcome: a result, or one of the exceptions below.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Clock = Callable[[], float]

# Items batched together differ in size by at most this ratio, which bounds what padding wastes.
WIDEST_RATIO = 1.5
# Weight of the newest call in the running estimate of seconds of work for each unit of size.
SPEED_MEMORY = 0.1
# How often a stopped-looking worker is noticed when nothing else happens.
SUPERVISION_S = 0.5

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Admission refused: too much is waiting, or the wait would pass the deadline."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpiredError(Exception):
    """The item's deadline passed while it waited."""


class ClosedError(Exception):
    """The batcher is shut down."""


class CallFailedError(Exception):
    """The batched call raised; `__cause__` says what."""


class Observer(Protocol):
    """What the batcher reports."""

    def batch_run(self, items: int, duration_s: float) -> None: ...

    def queue_changed(self, items: int, size: float) -> None: ...

    def worker_failed(self, kind: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Timed(Generic[Result]):
    """A result with what it cost: time in the queue and in the call it shared."""

    value: Result
    queue_s: float
    call_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch items and max_area (padded size: largest x count) a call; max_waiting size in the queue."""

    max_batch: int
    max_area: float
    max_waiting: float


@dataclass(slots=True, eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    size: float
    deadline: float
    enqueued: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Timed[Result]]
    done: bool = field(default=False)


class Batcher(Generic[Item, Result]):
    """`call` maps a list of items to as many results, in order; it runs in `workers` threads at once."""

    def __init__(
        self,
        call: Callable[[list[Item]], Sequence[Result]],
        *,
        workers: int,
        limits: Limits,
        observer: Observer,
        clock: Clock = time.monotonic,
    ) -> None:
        self._call = call
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._wake = threading.Condition()
        self._waiting: list[_Entry[Item, Result]] = []
        self._waiting_size = 0.0
        self._running_size = 0.0
        self._seconds_per_size = 0.0
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._wanted_workers = workers
        self._stop = threading.Event()
        for _ in range(workers):
            self._start_worker()
        self._supervisor = threading.Thread(target=self._supervise, name="batcher-supervisor", daemon=True)
        self._supervisor.start()

    async def submit(self, item: Item, *, size: float, deadline: float) -> Timed[Result]:
        """Wait for the item's result. `size` is its cost, such as seconds of audio; `deadline` is on the
        batcher's clock. Cancelling the task drops the item before its call.

        Raises QueueFullError, ExpiredError, CallFailedError, ClosedError.
        """
        loop = asyncio.get_running_loop()
        now = self._clock()
        entry = _Entry[Item, Result](item, size, deadline, now, loop, loop.create_future())
        with self._wake:
            self._admit(entry, now)
            self._waiting.append(entry)
            self._waiting_size += size
            self._report_queue()
            self._wake.notify()
        try:
            return await entry.future
        finally:
            # Whoever left early (cancelled) must not be computed; whoever is done is gone already.
            if not entry.done:
                self._withdraw(entry)

    @property
    def alive(self) -> bool:
        """Whether every worker that should run does."""
        with self._wake:
            return not self._closing and sum(thread.is_alive() for thread in self._threads) >= self._wanted_workers

    def close(self, timeout_s: float) -> None:
        """Finish what is queued, then stop. What is left after `timeout_s` fails with ClosedError."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._stop.set()
        end = time.monotonic() + timeout_s
        for thread in (*self._threads, self._supervisor):
            thread.join(max(0.0, end - time.monotonic()))
        with self._wake:
            leftover, self._waiting = self._waiting, []
        for entry in leftover:
            self._finish(entry, ClosedError("the service is shutting down"))

    def _admit(self, entry: _Entry[Item, Result], now: float) -> None:
        if self._closing:
            raise ClosedError("the service is shutting down")
        ahead = self._waiting_size + self._running_size
        wait_s = ahead * self._seconds_per_size / max(1, self._wanted_workers)
        if self._waiting and self._waiting_size + entry.size > self._limits.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} clips are waiting", max(wait_s, 1.0))
        if now + wait_s > entry.deadline:
            raise QueueFullError(f"the wait would be {wait_s:.1f} s, past the deadline", wait_s)

    def _start_worker(self) -> None:
        thread = threading.Thread(target=self._work, name="batcher-worker", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting:
                    return
                batch = self._take()
                area = sum(entry.size for entry in batch)
                self._running_size += area
            try:
                if batch:
                    self._run(batch)
            except BaseException:
                # Even a worker that dies answers for what it took; the supervisor starts another.
                for entry in batch:
                    self._finish(entry, CallFailedError("the worker died"))
                raise
            finally:
                with self._wake:
                    self._running_size -= area

    def _take(self) -> list[_Entry[Item, Result]]:
        """The oldest item and later ones of similar size, within the limits; expired ones are answered."""
        now = self._clock()
        expired = [entry for entry in self._waiting if entry.deadline <= now or entry.future.cancelled()]
        for entry in expired:
            self._waiting.remove(entry)
            self._finish(entry, ExpiredError("the deadline passed in the queue"))
        batch: list[_Entry[Item, Result]] = []
        if self._waiting:
            smallest = largest = self._waiting[0].size
            for entry in self._waiting:
                low, high = min(smallest, entry.size), max(largest, entry.size)
                fits = high <= WIDEST_RATIO * low and high * (len(batch) + 1) <= self._limits.max_area
                if not batch or fits:
                    batch.append(entry)
                    smallest, largest = low, high
                if len(batch) >= self._limits.max_batch:
                    break
            taken = set(map(id, batch))
            self._waiting = [entry for entry in self._waiting if id(entry) not in taken]
        self._waiting_size = sum(entry.size for entry in self._waiting)
        self._report_queue()
        return batch

    def _run(self, batch: list[_Entry[Item, Result]]) -> None:
        start, tick = self._clock(), time.perf_counter()
        try:
            results = self._call([entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            log.exception("batched call failed")
            self._observer.worker_failed("call")
            for entry in batch:
                failure = CallFailedError("the call failed")
                failure.__cause__ = error
                self._finish(entry, failure)
            return
        call_s = time.perf_counter() - tick
        self._learn_speed(call_s, max(entry.size for entry in batch) * len(batch))
        self._observer.batch_run(len(batch), call_s)
        for entry, result in zip(batch, results, strict=True):
            self._finish(entry, Timed(result, max(0.0, start - entry.enqueued), call_s))

    def _learn_speed(self, call_s: float, area: float) -> None:
        rate = call_s / max(area, 1e-9)
        with self._wake:
            known = self._seconds_per_size
            self._seconds_per_size = rate if known == 0 else known + SPEED_MEMORY * (rate - known)

    def _finish(self, entry: _Entry[Item, Result], outcome: Timed[Result] | Exception) -> None:
        """Deliver on the submitter's loop; a submitter that is gone takes nothing with it."""
        entry.done = True

        def deliver() -> None:
            if entry.future.done():
                return
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

        try:
            entry.loop.call_soon_threadsafe(deliver)
        except RuntimeError:
            log.warning("a result arrived after its event loop was closed")

    def _withdraw(self, entry: _Entry[Item, Result]) -> None:
        with self._wake:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._waiting_size = sum(other.size for other in self._waiting)
                self._report_queue()

    def _report_queue(self) -> None:
        self._observer.queue_changed(len(self._waiting), self._waiting_size)

    def _supervise(self) -> None:
        """Replace workers that died."""
        while not self._stop.wait(SUPERVISION_S):
            with self._wake:
                dead = [thread for thread in self._threads if not thread.is_alive()]
                for thread in dead:
                    self._threads.remove(thread)
                    self._observer.worker_failed("restart")
                    self._start_worker()
