"""What waits in the batcher's queue, what it may ask for, and how it may end."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Priority(enum.Enum):
    """How many seconds an item gives way to more urgent ones."""

    STREAM = 0.0
    CLIP = 0.1
    BULK = 1.0


class QueueFullError(Exception):
    """Admission refused: too much is waiting, or the wait would pass the deadline."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpiredError(Exception):
    """The item's deadline passed while it waited."""


class AbandonedError(Exception):
    """Whoever wanted the item went away while it waited."""


class ClosedError(Exception):
    """The batcher is shut down."""


class CallFailedError(Exception):
    """The batched call raised (`__cause__` says what), hung, or died with its worker."""


class Observer(Protocol):
    """What the batcher reports."""

    def batch_run(self, items: int, size: float, area: float, duration_s: float) -> None: ...

    def queue_changed(self, items: int, size: float) -> None: ...

    def worker_failed(self, kind: str) -> None: ...

    def dropped(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Timed(Generic[Result]):
    """A result with what it cost: time in the queue and in the call it shared."""

    value: Result
    queue_s: float
    call_s: float


@dataclass(slots=True, eq=False)
class Entry(Generic[Item, Result]):
    """An item that waits or is in its call, and who waits for it."""

    item: Item
    group: Hashable
    size: float
    cost_s: float  # predicted
    turn: float  # least goes first
    gather_s: float
    most: int  # items in its call
    deadline: float
    enqueued: float
    abandoned: Callable[[], bool]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Timed[Result]]
    done: bool = field(default=False)

    def finish(self, outcome: Timed[Result] | Exception) -> None:
        """Deliver on the submitter's loop, once; a submitter that is gone takes nothing with it."""
        finish_all([(self, outcome)])

    def deliver(self, outcome: Timed[Result] | Exception) -> None:
        """On the submitter's loop."""
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


def finish_all(outcomes: Sequence[tuple[Entry[Item, Result], Timed[Result] | Exception]]) -> None:
    """Deliver each, waking a loop once for all that are its own: woken for the first of a batch, it would contend for
    the interpreter with the thread that still has to tell of the others."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Entry[Item, Result], Timed[Result] | Exception]]] = {}
    for entry, outcome in outcomes:
        entry.done = True
        by_loop.setdefault(entry.loop, []).append((entry, outcome))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, own)
        except RuntimeError:
            log.warning("%d results arrived after their event loop was closed", len(own))


def _deliver(outcomes: Sequence[tuple[Entry[Item, Result], Timed[Result] | Exception]]) -> None:
    for entry, outcome in outcomes:
        entry.deliver(outcome)


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch items, where an item does not ask for fewer, and max_area (padded size: largest x count) a call;
    max_waiting size in the queue; a call that takes longer than hang_s is given up."""

    max_batch: int
    max_area: float
    max_waiting: float
    hang_s: float = 30.0
