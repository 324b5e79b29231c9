"""How much is under way, how fast it is answered, and so how long what comes in now would wait.

The batcher turns away what it cannot compute in time. But it is asked only after a request was read, routed and
decoded, which takes the event loop about as long as answering takes a core: at twice its capacity a service that waits
until then spends itself on refusals, and what it accepts is late. Here the whole way is counted, and a request can be
turned away with its head.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# As `loop.call_soon`.
Later = Callable[..., object]

# So few requests cannot be too many, whatever holds them up; the batcher still guards its own queue.
FEW = 64
# Weight of the newest answer in the running estimate of the time between two.
PACE_MEMORY = 0.02
# One stall of the machine says little about the answers after it.
LONGEST_GAP_S = 0.25
# Nothing is under way for longer than its deadline by our doing. What a crowd that was answered nothing for so long
# waits for is unknown, and the pace before says ever less: refused requests teach no other.
STALE_S = 10.0
# Of the time a client gives, what the wait may take. As much again passes before a head is read and after the answer is
# there, and the pace is an estimate: with a half, at twice the capacity, a fourth of what was accepted came too late.
SHARE = 0.25


class Congestion:
    """Of one event loop; not for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turn_began: float | None = None
        self._turn_s = 0.0
        self._turned_at = float("-inf")
        self._under_way = 0
        self._between_s = 0.0
        self._last: float | None = None
        # When the crowd came together or had its latest answer.
        self._heard = 0.0

    def hear(self, later: Later) -> None:
        """A request's head is read. What the loop has not read yet is in no queue of ours, but waits for as long as a
        turn of the loop takes. So turns are timed: from the first head of one to what is called `later` and `later`
        again, which is when the heads of the next have been read."""
        if self._turn_began is None:
            self._turn_began = now = self._clock()
            if now - self._turned_at > self._turn_s:
                # There were turns without any since: it says nothing of this one.
                self._turn_s = 0.0
            later(later, self._turned)

    def _turned(self) -> None:
        self._turned_at = self._clock()
        if self._turn_began is not None:
            self._turn_s = self._turned_at - self._turn_began
            self._turn_began = None

    def begin(self) -> None:
        """A request is there as a whole."""
        self._under_way += 1
        if self._under_way == FEW:
            self._heard = self._clock()

    def end(self) -> None:
        """Its answer begins, or its client went away. How fast a client reads is not our pace."""
        many = self._under_way >= FEW
        self._under_way -= 1
        if not many:
            # What follows may have waited for clients, not for us.
            self._last = None
            return
        now = self._clock()
        self._between_s = self._pace_s(now)
        if self._last is not None:
            self._between_s += PACE_MEMORY * (min(now - self._last, LONGEST_GAP_S) - self._between_s)
        self._last = self._heard = now

    @property
    def wait_s(self) -> float:
        """How long a request whose head is read now has waited and would be under way; 0 while there are few."""
        if self._under_way < FEW:
            return 0.0
        now = self._clock()
        turn_s = max(self._turn_s, now - self._turn_began if self._turn_began is not None else 0.0)
        return self._under_way * self._pace_s(now) + turn_s

    def _pace_s(self, now: float) -> float:
        """Between two answers; once stale, half as long after each `STALE_S`."""
        return float(self._between_s * 0.5 ** max(0.0, (now - self._heard) / STALE_S - 1.0))
