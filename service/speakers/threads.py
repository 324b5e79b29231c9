"""The threads that call the database of profiles, and whether it answers.

Its calls may take long or, on a disk or network that is gone, never return. Then they must not take other requests
with them: the database has threads of its own, is asked regularly by yet another, and while it does not answer nobody
waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from service.deadlines import within
from service.errors import StorageUnavailableError

T = TypeVar("T")

# More than connections would be kept for, and enough to keep a database busy.
THREADS = 4
PING_EVERY_S = 2.0
# What ordinary calls take is far below; locks and statements are given up before.
PING_PATIENCE_S = 5.0
CALL_PATIENCE_S = 20.0
STUCK_S = 60.0
RETRY_AFTER_S = 2.0


class ProfileThreads:
    """Runs calls of the database. `ping` is one that raises where it does not answer."""

    def __init__(self, ping: Callable[[], None]) -> None:
        self._ping = ping
        self._good = True
        self._pinged: float | None = None
        self._since: dict[object, float] = {}
        # Calls block on locks and disks; they must not keep decoders waiting.
        self._calling = ThreadPoolExecutor(THREADS, thread_name_prefix="profiles")
        # Identification may read many profiles: one at a time, so that a verification never queues behind it.
        self._comparing = ThreadPoolExecutor(1, thread_name_prefix="identify")
        self._closed = threading.Event()
        # A daemon: the process must be able to end while this waits for an answer.
        threading.Thread(target=self._ask, name="profiles-ping", daemon=True).start()

    @property
    def answers(self) -> bool:
        """Whether the database does, as far as is known."""
        asking, now = self._pinged, time.monotonic()
        waits = asking is not None and now - asking > PING_PATIENCE_S
        return self._good and not waits and self.longest_s() < CALL_PATIENCE_S

    @property
    def stuck(self) -> bool:
        """Whether some call has not returned for so long that it never will."""
        return self.longest_s() > STUCK_S

    def longest_s(self) -> float:
        """How long the longest call that is under way has taken."""
        return max((time.monotonic() - since for since in list(self._since.values())), default=0.0)

    async def call(self, work: Callable[[], T], deadline: float) -> T:
        """Raises ServiceError: at once where the database does not answer."""
        self._require()
        return await within(self._calling, lambda: self._timed(work), deadline)

    async def compare(self, work: Callable[[], T], deadline: float) -> T:
        """Likewise, for work that reads many profiles and may take its time, after that before it."""
        self._require()
        return await within(self._comparing, work, deadline)

    def close(self, patience_s: float) -> bool:
        """Stop all threads; False where some were still in a call that long after. Blocking."""
        self._closed.set()
        for pool in (self._calling, self._comparing):
            pool.shutdown(wait=False, cancel_futures=True)
        threads = [*self._calling._threads, *self._comparing._threads]
        end = time.monotonic() + patience_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _require(self) -> None:
        if not self.answers:
            raise StorageUnavailableError(
                "the profile database does not answer; nothing was changed", retry_after_s=RETRY_AFTER_S
            )

    def _timed(self, work: Callable[[], T]) -> T:
        with self._under_way():
            return work()

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        token = object()
        self._since[token] = time.monotonic()
        try:
            yield
        finally:
            del self._since[token]

    def _ask(self) -> None:
        while not self._closed.wait(PING_EVERY_S):
            self._pinged = time.monotonic()
            try:
                self._ping()
                self._good = True
            # Whatever it is, nobody should wait for this database; the store has logged it.
            except Exception:
                self._good = False
            self._pinged = None
