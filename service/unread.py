"""Clients that take little of what is written to them.

A transport keeps what the kernel does not take, and the application what the transport does not: an answer that is read
byte by byte would be held for hours. The kernel tells of what a client took in leaps, of a third of its own buffer, so
what is asked for is an amount within a time, not a speed at any moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Reading:
    """What a client had taken, when its time began, and since when there has been something to read."""

    taken_bytes: int
    since: float
    begun: float


class Readers:
    """Those who have something to read. Within `timeout_s` each has to take what its transport's `least_rate` makes of
    that time, and one byte at least, or all there is; and all together may leave `most_bytes`."""

    def __init__(self, timeout_s: float, most_bytes: int, clock: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._most_bytes = most_bytes
        self._clock = clock
        self._readings: weakref.WeakKeyDictionary[Any, _Reading] = weakref.WeakKeyDictionary()

    def too_slow(self, connections: Iterable[Any]) -> Iterator[Any]:
        """Those of `connections`, all that there are now, whose time is over, and while the others leave too much those
        that have had the longest to read."""
        now = self._clock()
        left: list[tuple[float, int, Any]] = []
        for connection in connections:
            transport = connection.transport
            unread_bytes = transport.get_write_buffer_size()
            if unread_bytes == 0:
                self._readings.pop(connection, None)
                continue
            taken_bytes = transport.taken_bytes
            reading = self._readings.setdefault(connection, _Reading(taken_bytes, now, now))
            if taken_bytes - reading.taken_bytes >= max(1, transport.least_rate * self._timeout_s):
                reading.taken_bytes, reading.since = taken_bytes, now
            elif now - reading.since >= self._timeout_s:
                yield connection
                continue
            left.append((reading.begun, unread_bytes, connection))
        together = sum(unread_bytes for _, unread_bytes, _ in left)
        for _, unread_bytes, connection in sorted(left, key=lambda one: one[0]):
            if together <= self._most_bytes:
                break
            together -= unread_bytes
            yield connection
