"""Whose turn it is to write to the database of profiles."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

# With SQLite's own wait less than a request has by default: what its client was told has failed is not stored later.
TURN_TIMEOUT_S = 4.0


class Turn:
    """One writer of this process after the other. SQLite's own lock has no queue: who waits looks again every tenth of
    a second, and where others are busy may find it taken until the time is up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=TURN_TIMEOUT_S):
            raise TimeoutError("other writers did not end")
        try:
            yield
        finally:
            self._lock.release()


# By the database's file: all stores on one share its.
TURNS: defaultdict[str | None, Turn] = defaultdict(Turn)
