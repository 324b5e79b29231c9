"""The threads that take apart what clients send: a clip or a form each call.

A crafted file may keep a decoder for ever, and a thread cannot be stopped. So it is left: whoever waits is answered,
another thread takes its place, and the process ends without it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from service.batching import MOST_STUCK, UNREADY_S
from service.errors import ServiceError

P = ParamSpec("P")
T = TypeVar("T")

# Two seconds of 16 kHz WAV. What is no larger costs less than handing it to another thread and back.
INLINE_BYTES = 64 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Call:
    future: Future[Any]
    work: Callable[[], Any]


@dataclass(slots=True, eq=False)
class _Worker:
    """A thread and whom it works for. `given_up` means that what it still brings is not wanted."""

    thread: threading.Thread | None = None
    future: Future[Any] | None = None
    since: float = 0.0
    given_up: bool = False

    @property
    def stopped(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class Decoders(Executor):
    """`start` before use; `supervise` every so often; `close` after."""

    def __init__(
        self,
        threads: int,
        *,
        hang_s: float,
        hung: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A call that takes longer than `hang_s` is given up, and `hung` is told."""
        self._threads = threads
        self._hang_s = hang_s
        self._hung = hung
        self._clock = clock
        self._lock = threading.Lock()
        # None ends the worker that takes it.
        self._waiting: SimpleQueue[_Call | None] = SimpleQueue()
        self._workers: list[_Worker] = []
        self._stuck: list[_Worker] = []
        self._hung_at = float("-inf")

    def start(self) -> None:
        """Start the threads. Raises RuntimeError where the system has none to give."""
        for _ in range(self._threads):
            self._start_worker()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        self._waiting.put(_Call(future, lambda: fn(*args, **kwargs)))
        return future

    @property
    def alive(self) -> bool:
        """Whether every thread that should run does, and none hung lately."""
        with self._lock:
            working = sum(not (worker.stopped or self._hangs(worker)) for worker in self._workers)
            return working >= self._threads and self._clock() - self._hung_at >= UNREADY_S

    @property
    def beyond_repair(self) -> bool:
        """Whether so many threads are stuck that the process should be replaced."""
        with self._lock:
            return sum(not worker.stopped for worker in self._stuck) >= MOST_STUCK

    def supervise(self) -> None:
        """Leave the threads that hang, and start others in their place."""
        with self._lock:
            hanging = [worker for worker in self._workers if self._hangs(worker)]
            for worker in hanging:
                worker.given_up = True
                self._hung_at = self._clock()
            self._workers = [worker for worker in self._workers if not (worker.given_up or worker.stopped)]
            self._stuck = [worker for worker in (*self._stuck, *hanging) if not worker.stopped]
        for worker in hanging:
            log.error("a decoder has not returned for %g s; its thread is left and replaced", self._hang_s)
            self._hung()
            assert worker.future is not None
            worker.future.set_exception(ServiceError(f"decoding took longer than {self._hang_s:g} s and was given up"))
        try:
            while len(self._workers) < self._threads:
                self._start_worker()
        except RuntimeError:
            # No thread to be had now: tried again at the next look.
            log.exception("a decoder could not be started")

    def close(self, patience_s: float) -> None:
        """Stop all threads; what waits is cancelled, and those still in a call that long after are left. Blocking."""
        try:
            while True:
                call = self._waiting.get_nowait()
                if call is not None:
                    call.future.cancel()
        except Empty:
            pass
        with self._lock:
            workers = list(self._workers)
        for _ in workers:
            self._waiting.put(None)
        end = time.monotonic() + patience_s
        for worker in workers:
            if worker.thread is not None:
                worker.thread.join(max(0.0, end - time.monotonic()))

    def _hangs(self, worker: _Worker) -> bool:
        return worker.future is not None and self._clock() - worker.since > self._hang_s

    def _start_worker(self) -> None:
        worker = _Worker()
        # A daemon: the process must be able to end while one hangs.
        worker.thread = threading.Thread(target=self._work, args=(worker,), name="decoder", daemon=True)
        worker.thread.start()
        with self._lock:
            self._workers.append(worker)

    def _work(self, worker: _Worker) -> None:
        while not worker.given_up:
            call = self._waiting.get()
            if call is None:
                return
            if call.future.set_running_or_notify_cancel():
                self._run(worker, call)
            # Lest a clip stay in memory until the next one comes.
            del call

    def _run(self, worker: _Worker, call: _Call) -> None:
        with self._lock:
            worker.future, worker.since = call.future, self._clock()
        try:
            result = call.work()
        # Whatever it is, it is the caller's, who waits in another thread.
        except BaseException as error:
            if self._wanted(worker):
                call.future.set_exception(error)
            # Its traceback holds this frame: without the circle the clip is gone with the request.
            del call
        else:
            if self._wanted(worker):
                call.future.set_result(result)

    def _wanted(self, worker: _Worker) -> bool:
        """Whether what its call brings is; a worker that is has nobody from here on."""
        with self._lock:
            if not worker.given_up:
                worker.future = None
            return not worker.given_up
