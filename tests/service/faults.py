"""What goes wrong in a graph's call."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.service.threads import PATIENCE_S


class Faults:
    """What the next calls do first."""

    def __init__(self) -> None:
        self.now: Callable[[], None] = lambda: None
        self.calls = 0
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    def once(self, fault: str) -> None:
        def begin() -> None:
            self.now = lambda: None
            getattr(self, fault)()

        self.now = begin

    def hang(self) -> None:
        self.entered.release()
        assert self.go_on.wait(PATIENCE_S)

    def fail(self) -> None:
        raise MemoryError("no room")

    def die(self) -> None:
        raise SystemExit
