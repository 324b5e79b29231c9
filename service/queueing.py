"""What waits in the batcher's queue may ask for, and how it may end."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")


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


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch items and max_area (padded size: largest x count) a call; max_waiting size in the queue;
    a call that takes longer than hang_s is given up."""

    max_batch: int
    max_area: float
    max_waiting: float
    hang_s: float = 30.0
