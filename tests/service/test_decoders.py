"""Decoders that fail or hang: who waits is answered, others go on, and nothing waits for them at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from service.batching import MOST_STUCK, UNREADY_S
from service.decoders import Decoders
from service.errors import ServiceError
from tests.conftest import REPOSITORY
from tests.service.threads import PATIENCE_S

HANG_S = 30.0


class Hang:
    """A call that waits until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self) -> int:
        self.entered.release()
        assert self.go_on.wait(PATIENCE_S)
        return 1

    def begun(self, decoders: Decoders) -> Future[int]:
        waits = decoders.submit(self)
        assert self.entered.acquire(timeout=PATIENCE_S)
        return waits


@contextmanager
def running(hung: Callable[[], None] = lambda: None, *, clock: Callable[[], float] = lambda: 0.0) -> Iterator[Decoders]:
    """One thread."""
    decoders = Decoders(1, hang_s=HANG_S, hung=hung, clock=clock)
    decoders.start()
    try:
        yield decoders
    finally:
        decoders.close(PATIENCE_S)


def test_results_and_failures_are_the_callers() -> None:
    with running() as decoders:
        with pytest.raises(ZeroDivisionError):
            decoders.submit(lambda: 1 // 0).result(PATIENCE_S)
        assert decoders.submit(divmod, 7, 2).result(PATIENCE_S) == (3, 1)
        assert decoders.alive


def test_a_call_that_hangs_is_answered_counted_shown_and_another_thread_takes_its_place() -> None:
    now, counted, hang = [0.0], [0], Hang()

    def hung() -> None:
        counted[0] += 1

    with running(hung, clock=lambda: now[0]) as decoders:
        hanging = hang.begun(decoders)
        after = decoders.submit(lambda: 2)
        now[0] = HANG_S
        decoders.supervise()
        assert decoders.alive
        assert not hanging.done()
        now[0] = HANG_S + 1
        assert not decoders.alive
        decoders.supervise()
        with pytest.raises(ServiceError, match="longer than 30 s"):
            hanging.result(0)
        assert after.result(PATIENCE_S) == 2
        # Not ready for long enough that a probe sees it.
        assert not decoders.alive
        now[0] += UNREADY_S
        assert decoders.alive
        # Nobody wants it any more, and the thread ends.
        (stuck,) = decoders._stuck
        hang.go_on.set()
        assert stuck.thread is not None
        stuck.thread.join(PATIENCE_S)
        decoders.supervise()
        assert decoders._stuck == []
        assert counted == [1]


def test_too_many_hanging_threads_are_beyond_repair() -> None:
    now, hang, seen = [0.0], Hang(), []
    with running(clock=lambda: now[0]) as decoders:
        for _ in range(MOST_STUCK):
            seen.append(decoders.beyond_repair)
            hang.begun(decoders)
            now[0] += HANG_S + 1
            decoders.supervise()
        seen.append(decoders.beyond_repair)
        hang.go_on.set()
    assert seen == [False] * MOST_STUCK + [True]


def test_closing_does_not_wait_for_a_call_that_hangs() -> None:
    hang = Hang()
    with running() as decoders:
        hanging = hang.begun(decoders)
        waiting = decoders.submit(lambda: 2)
        decoders.close(0.05)
        assert waiting.cancelled()
        assert not hanging.done()
        hang.go_on.set()
        assert hanging.result(PATIENCE_S) == 1


def test_the_process_ends_while_a_call_hangs() -> None:
    code = (
        "import threading; from service.decoders import Decoders; hangs = threading.Event()\n"
        "decoders = Decoders(1, hang_s=30, hung=lambda: None); decoders.start()\n"
        "decoders.submit(lambda: (hangs.set(), threading.Event().wait()))\n"
        "hangs.wait(); decoders.close(0.05); print('closed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr
