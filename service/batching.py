"""The dynamic batcher: turns single submissions into batched calls. Knows nothing of audio or HTTP.

A worker that is free takes the item whose turn it is at once, together with waiting items of its group and
of similar size; what arrives while all workers are busy waits and is batched by the next free one. So an idle service
adds no delay, but to items that are said to wait a moment for others (`gather_s`), and a busy one fills its batches by
itself. Items whose calls gain nothing from company say so (`most`), until the queue is so long that they have waited
for BEHIND_S: then what counts is that workers ask for the interpreter less often, of which the event loop has need.

Where there are as many workers as cores, one of them runs on the event loop's: there a small batch costs more than
the same items would have in the next one of another worker. So workers may be on standby: these begin when as much
waits as fills a batch, or something has waited for STANDBY_S.

Turns go by age, and an urgent item counts as older than it is: it goes before others that have waited a
little longer, and nothing waits for ever.

Every item ends in exactly one outcome: a result, or one of the exceptions below. A worker that dies or
hangs answers for what it took, and another takes its place.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.queueing import (
    AbandonedError,
    CallFailedError,
    ClosedError,
    Entry,
    ExpiredError,
    Limits,
    Observer,
    Priority,
    QueueFullError,
    Timed,
    finish_all,
)

Item = TypeVar("Item")
Result = TypeVar("Result")
Clock = Callable[[], float]

# Items batched together differ in size by at most this ratio, which bounds what padding wastes.
WIDEST_RATIO = 1.5
# Weight of the newest call in the running estimate of seconds of work for each unit of size, and how many times slower
# than that it counts at most.
SPEED_MEMORY = 0.1
SLOWEST_RATIO = 4.0
# How long an item waits until a worker on standby takes it. About a call of a full batch of short clips.
STANDBY_S = 0.010
# From then on an item takes along as many as may share a call. On two cores, shared with a client that asked for twice
# as much as could be done, calls of eight answered 1,040 to 1,100 clips a second, of one 760 to 820.
BEHIND_S = 0.05
# How much nicer workers are than the event loop (2.4 times less weight): where both want a core, more people wait for a
# word from the loop (refusals, probes, streams) than for one graph call.
NICENESS = 4
# How often a worker that stopped or hangs is noticed.
SUPERVISION_S = 0.5
# After a worker died or hung, so that whoever asks every few seconds whether to send requests here sees it.
UNREADY_S = 5.0
# So many calls in a row that raise are the same to whoever asks: one or two may have been the fault of what came.
FAILING_CALLS = 3
# With this many threads stuck in calls that never end, only a new process helps.
MOST_STUCK = 4

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Worker(Generic[Item, Result]):
    """A thread and the batch it is at. `given_up` means that what it still brings is not wanted."""

    thread: threading.Thread | None = None
    batch: list[Entry[Item, Result]] = field(default_factory=list)
    since: float = 0.0
    given_up: bool = False

    @property
    def stopped(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class Batcher(Generic[Item, Result]):
    """`call` maps items of one group to as many results, in order; it runs in `workers` threads at once, the last
    `standby` of which begin late."""

    def __init__(
        self,
        call: Callable[[list[Item]], Sequence[Result]],
        *,
        workers: int,
        standby: int = 0,
        limits: Limits,
        observer: Observer,
        clock: Clock = time.monotonic,
    ) -> None:
        self._call = call
        self._ready_workers = workers - standby
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._wake = threading.Condition()
        self._waiting: list[Entry[Item, Result]] = []
        self._waiting_size = 0.0
        # When an idle worker looks again by itself.
        self._looks_at = float("inf")
        self._seconds_per_size: dict[Hashable, float] = {}
        self._forgotten_rate = 0.0
        self._closing = False
        self._workers: list[_Worker[Item, Result]] = []
        self._stuck: list[_Worker[Item, Result]] = []
        self._failed_at = float("-inf")
        self._raised, self._raised_at = 0, float("-inf")
        self._stop = threading.Event()
        for _ in range(workers):
            self._start_worker()
        self._supervisor = threading.Thread(target=self._supervise, name="batcher-supervisor", daemon=True)
        self._supervisor.start()

    async def submit(
        self,
        item: Item,
        *,
        size: float,
        deadline: float,
        group: Hashable = None,
        priority: Priority = Priority.CLIP,
        gather_s: float = 0.0,
        most: int | None = None,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Timed[Result]:
        """Wait for the item's result. `size` is its cost, such as seconds of audio; `deadline` is on the
        batcher's clock; `gather_s` is how long it waits for others to share its call, if they do not fill it before;
        `most`, if given, is how many share it at most, as long as it has not waited for BEHIND_S.
        Cancelling the task drops the item before its call, as does `abandoned`, asked from a worker's thread, when
        it says that nobody waits any more.

        Raises QueueFullError, ExpiredError, AbandonedError, CallFailedError, ClosedError.
        """
        loop = asyncio.get_running_loop()
        now = self._clock()
        with self._wake:
            cost_s = size * self._rate(group)
            turn, future = now + priority.value, loop.create_future()
            limit = min(most or self._limits.max_batch, self._limits.max_batch)
            entry: Entry[Item, Result] = Entry(
                item, group, size, cost_s, turn, gather_s, limit, deadline, now, abandoned, loop, future
            )
            self._admit(entry, now)
            bisect.insort(self._waiting, entry, key=lambda other: other.turn)
            self._waiting_size += size
            self._report_queue()
            due = self._due()
            if due < self._looks_at or due <= now:
                self._wake.notify()
        try:
            return await entry.future
        finally:
            # Whoever left early (cancelled) must not be computed; whoever is done is gone already.
            if not entry.done:
                self._withdraw(entry)

    @property
    def alive(self) -> bool:
        """Whether every worker that should run does, none failed lately, and calls do not raise one after another."""
        with self._wake:
            failed_at = max(self._failed_at, self._raised_at if self._raised >= FAILING_CALLS else float("-inf"))
            return (
                not self._closing
                and self._supervisor.is_alive()
                and self._clock() - failed_at >= UNREADY_S
                and not any(worker.stopped or self._hangs(worker) for worker in self._workers)
            )

    @property
    def beyond_repair(self) -> bool:
        """Whether so many threads are stuck that the process should be replaced."""
        with self._wake:
            return sum(not worker.stopped for worker in self._stuck) >= MOST_STUCK

    def close(self, timeout_s: float) -> None:
        """Finish what is queued, then stop. What is left after `timeout_s` fails with ClosedError."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._stop.set()
        end = time.monotonic() + timeout_s
        for thread in (*(worker.thread for worker in self._workers), self._supervisor):
            if thread is not None and thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))
        with self._wake:
            leftover, self._waiting = self._waiting, []
            for worker in self._workers:
                worker.given_up = True
                leftover += worker.batch
        for entry in leftover:
            entry.finish(ClosedError("the service is shutting down"))

    def _admit(self, entry: Entry[Item, Result], now: float) -> None:
        if self._closing:
            raise ClosedError("the service is shutting down")
        # A worker may still hold what it has answered already.
        running = [other for worker in self._workers for other in worker.batch if not other.done]
        running_s = sum(other.cost_s for other in running)
        ahead_s = sum(other.cost_s for other in self._waiting if other.turn <= entry.turn)
        wait_s = (running_s + ahead_s) / max(1, len(self._workers))
        if self._waiting and self._waiting_size + entry.size > self._limits.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} clips are waiting", max(wait_s, 1.0))
        if not self._waiting and not running:
            return  # Nothing to wait for, and what its call takes is an estimate, which only calls mend.
        # The call that it will share takes as long as a full batch of its like.
        most = self._limits.max_batch if wait_s >= BEHIND_S else entry.most
        call_s = min(entry.cost_s * most, self._rate(entry.group) * max(self._limits.max_area, entry.size))
        if now + wait_s + call_s > entry.deadline:
            raise QueueFullError(f"it would take {wait_s + call_s:.1f} s, past the deadline", wait_s)

    def _rate(self, group: Hashable) -> float:
        """Seconds of work for each unit of size; of a group that was never run, as of the slowest."""
        return self._seconds_per_size.get(group, max(self._seconds_per_size.values(), default=self._forgotten_rate))

    def _start_worker(self) -> None:
        worker = _Worker[Item, Result]()
        worker.thread = threading.Thread(target=self._work, args=(worker,), name="batcher-worker", daemon=True)
        self._workers.append(worker)
        worker.thread.start()

    def _work(self, worker: _Worker[Item, Result]) -> None:
        if sys.platform == "linux":  # Elsewhere it would be of the process.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS))
        while True:
            with self._wake:
                while not self._closing and (due := self._due()) > (now := self._clock()):
                    looks = due < self._looks_at
                    if looks:
                        self._looks_at = due
                    self._wake.wait(due - now if looks else None)
                    if looks:
                        self._looks_at = float("inf")
                if not self._waiting:
                    return
                batch = worker.batch = self._take()
                worker.since = self._clock()
                if self._waiting:
                    self._wake.notify()
            try:
                if batch:
                    self._run(worker, batch)
            except BaseException:
                # Even a worker that dies answers for what it took; the supervisor starts another.
                for entry in batch:
                    entry.finish(CallFailedError("the worker died"))
                raise
            finally:
                with self._wake:
                    worker.batch = []
            if worker.given_up:
                return

    def _due(self) -> float:
        """When an idle worker should begin, on the batcher's clock: never where nothing waits."""
        if self._waiting and len(self._waiting) >= self._waiting[0].most:
            return float("-inf")
        if self._waiting_size >= self._limits.max_area:
            return float("-inf")
        busy = sum(bool(worker.batch) for worker in self._workers)
        least_s = 0.0 if busy < self._ready_workers else STANDBY_S
        return min((entry.enqueued + max(entry.gather_s, least_s) for entry in self._waiting), default=float("inf"))

    def _take(self) -> list[Entry[Item, Result]]:
        """The item whose turn it is and others that may share its call, within the limits; expired ones are
        answered."""
        now = self._clock()
        standing: list[Entry[Item, Result]] = []
        for entry in self._waiting:
            if entry.deadline <= now:
                self._observer.dropped("expired")
                entry.finish(ExpiredError("the deadline passed in the queue"))
            elif entry.future.cancelled() or entry.abandoned():
                self._observer.dropped("abandoned")
                entry.finish(AbandonedError("nobody waits for it any more"))
            else:
                standing.append(entry)
        batch: list[Entry[Item, Result]] = []
        # A burst is shared out among the workers that have nothing to do, this one included.
        free = self._ready_workers - sum(bool(worker.batch) for worker in self._workers)
        if standing:
            # Unless it has waited in order to share its call.
            shared = -(-len(standing) // max(1, free)) if not standing[0].gather_s else len(standing)
            behind = now - standing[0].enqueued >= BEHIND_S
            most = min(self._limits.max_batch if behind else standing[0].most, shared)
            smallest = largest = standing[0].size
            for entry in standing:
                low, high = min(smallest, entry.size), max(largest, entry.size)
                fits = high <= WIDEST_RATIO * low and high * (len(batch) + 1) <= self._limits.max_area
                if not batch or (entry.group == batch[0].group and fits):
                    batch.append(entry)
                    smallest, largest = low, high
                if len(batch) >= most:
                    break
            taken = set(map(id, batch))
            standing = [entry for entry in standing if id(entry) not in taken]
        self._waiting = standing
        self._waiting_size = sum(entry.size for entry in standing)
        self._report_queue()
        return batch

    def _run(self, worker: _Worker[Item, Result], batch: list[Entry[Item, Result]]) -> None:
        start, tick = self._clock(), time.perf_counter()
        try:
            results = self._call([entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            log.exception("batched call failed")
            self._observer.worker_failed("call")
            with self._wake:
                self._raised, self._raised_at = self._raised + 1, self._clock()
            for entry in batch:
                failure = CallFailedError("the call failed")
                failure.__cause__ = error
                entry.finish(failure)
            return
        call_s = time.perf_counter() - tick
        if worker.given_up:
            return
        with self._wake:
            self._raised = 0
        size, area = sum(entry.size for entry in batch), max(entry.size for entry in batch) * len(batch)
        self._learn_speed(batch[0].group, call_s, area)
        self._observer.batch_run(len(batch), size, area, call_s)
        finish_all(
            [
                (entry, Timed(result, max(0.0, start - entry.enqueued), call_s))
                for entry, result in zip(batch, results, strict=True)
            ]
        )

    def _learn_speed(self, group: Hashable, call_s: float, area: float) -> None:
        rate = call_s / max(area, 1e-9)
        with self._wake:
            known = self._rate(group) or rate
            weight = SPEED_MEMORY if group in self._seconds_per_size else 1.0
            # A process that was stopped for a while says little about the next call.
            self._seconds_per_size[group] = known + weight * (min(rate, SLOWEST_RATIO * known) - known)

    def forget(self, gone: Callable[[Hashable], bool]) -> None:
        """Drop what was learnt of groups that will not come back. It still bounds what the first call of the next one
        can teach, which may be one that a stall of the machine held up."""
        with self._wake:
            self._forgotten_rate = max(self._seconds_per_size.values(), default=self._forgotten_rate)
            self._seconds_per_size = {group: rate for group, rate in self._seconds_per_size.items() if not gone(group)}

    def _withdraw(self, entry: Entry[Item, Result]) -> None:
        with self._wake:
            if entry in self._waiting:
                self._observer.dropped("expired" if entry.deadline <= self._clock() else "abandoned")
                self._waiting.remove(entry)
                self._waiting_size = sum(other.size for other in self._waiting)
                self._report_queue()

    def _report_queue(self) -> None:
        self._observer.queue_changed(len(self._waiting), self._waiting_size)

    def _hangs(self, worker: _Worker[Item, Result]) -> bool:
        return bool(worker.batch) and self._clock() - worker.since > self._limits.hang_s

    def _supervise(self) -> None:
        """Replace workers that died, and those that hang: a thread cannot be stopped, but it can be left."""
        while not self._stop.wait(SUPERVISION_S):
            with self._wake:
                for worker in [worker for worker in self._workers if self._hangs(worker)]:
                    worker.given_up = True
                    self._stuck.append(worker)
                    for entry in worker.batch:
                        entry.finish(CallFailedError(f"the call hung for {self._limits.hang_s:g} s"))
                    self._replace(worker, "hang")
                for worker in [worker for worker in self._workers if worker.stopped]:
                    self._replace(worker, "restart")
                self._stuck = [worker for worker in self._stuck if not worker.stopped]

    def _replace(self, worker: _Worker[Item, Result], kind: str) -> None:
        self._failed_at = self._clock()
        self._workers.remove(worker)
        self._observer.worker_failed(kind)
        try:
            self._start_worker()
        except RuntimeError:
            # No thread to be had now: tried again at the next look, since the one without a thread counts as stopped.
            log.exception("a worker could not be started")
