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
    """What a client had taken, and when its time began."""

    taken_bytes: int
    since: float


class Readers:
    """Those who have something to read. Within `timeout_s` each has to take what its transport's `least_rate` makes of
    that time, and one byte at least, or all there is."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._readings: weakref.WeakKeyDictionary[Any, _Reading] = weakref.WeakKeyDictionary()

    def too_slow(self, connections: Iterable[Any]) -> Iterator[Any]:
        """Those of `connections`, all that there are now, whose time is over."""
        now = self._clock()
        for connection in connections:
            transport = connection.transport
            if transport.get_write_buffer_size() == 0:
                self._readings.pop(connection, None)
                continue
            taken_bytes = transport.taken_bytes
            reading = self._readings.setdefault(connection, _Reading(taken_bytes, now))
            if taken_bytes - reading.taken_bytes >= max(1, transport.least_rate * self._timeout_s):
                reading.taken_bytes, reading.since = taken_bytes, now
            elif now - reading.since >= self._timeout_s:
                yield connection
