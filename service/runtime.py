"""The parts of a running service, built once: model, batcher, decoders, profiles."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from model_store import BundleError, LocalStore, ModelNotFoundError
from service import audio
from service.auth import Authenticator
from service.batching import (
    Batcher,
    CallFailedError,
    ClosedError,
    ExpiredError,
    Limits,
    QueueFullError,
)
from service.engine import Engine, Outputs
from service.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    NotFoundError,
    OverloadedError,
)
from service.intake import Clip
from service.metrics import Metrics
from service.settings import Settings, available_cpus
from service.speakers.store import ProfileStore
from service.timing import StageClock

T = TypeVar("T")
# Two seconds of 16 kHz WAV.
INLINE_BYTES = 64 * 1024
DRAIN_RETRY_AFTER_S = 1.0


class BatchObserver:
    """Reports the batcher into the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def batch_run(self, items: int, duration_s: float) -> None:  # noqa: ARG002  durations are per request
        self._metrics.batch_size.observe(items)

    def queue_changed(self, items: int, size: float) -> None:
        self._metrics.queue_depth.set(items)
        self._metrics.queued_audio.set(size)

    def worker_failed(self, kind: str) -> None:
        self._metrics.worker_failures.labels(kind).inc()


class Runtime:
    """Everything a route needs. `start` before use, `close` after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.authenticator = Authenticator(settings)
        self.store = LocalStore(settings.models_dir)
        self.started = False
        self.draining = False

    def start(self) -> None:
        """Load and warm the model, open the database. Blocking.

        Raises model_store.StoreError and StorageUnavailableError: better not to start than to start lame.
        """
        settings = self.settings
        cpus = available_cpus()
        self.engine = Engine(self.store.resolve(settings.model), intra_op_threads=settings.intra_op_threads)
        self.engine.warm_up(min(settings.max_batch, 8))
        self.profiles = ProfileStore(settings.profiles_url)
        workers = settings.inference_threads or max(1, cpus // settings.intra_op_threads)
        self.batcher: Batcher[audio.Waveform, Outputs] = Batcher(
            self.engine.run,
            workers=workers,
            limits=Limits(settings.max_batch, settings.max_batch_audio_s, settings.max_queued_audio_s),
            observer=BatchObserver(self.metrics),
        )
        self.decoders = ThreadPoolExecutor(settings.decode_threads or cpus, thread_name_prefix="decode")
        # Database calls block on locks and disks; they must not keep decoders waiting.
        self.database = ThreadPoolExecutor(4, thread_name_prefix="profiles")
        # Identification reads many profiles: one at a time, so that a verification never queues behind it.
        self.comparing = ThreadPoolExecutor(1, thread_name_prefix="identify")
        self.metrics.inference_threads.set(workers)
        self.metrics.model.info(
            {
                "name": self.engine.manifest.name,
                "version": str(self.engine.manifest.version),
                "digest": self.engine.bundle.digest,
            }
        )
        for keyword in self.engine.manifest.keywords.labels:
            self.metrics.detections.labels(keyword.label)
        self.metrics.ready.set(1)
        self.started = True

    def close(self, grace_s: float) -> None:
        """Finish what is queued, then stop every thread. Blocking."""
        self.metrics.ready.set(0)
        self.batcher.close(grace_s)
        self.decoders.shutdown(cancel_futures=True)
        self.comparing.shutdown(cancel_futures=True)
        self.database.shutdown()
        self.profiles.close()

    def checks(self) -> dict[str, bool]:
        """Readiness, check by check. Blocking: it asks the database."""
        try:
            self.profiles.ping()
            store = True
        except Exception:
            store = False
        return {"accepting": not self.draining, "inference": self.batcher.alive, "profiles": store}

    def engine_for(self, reference: str | None) -> Engine:
        """The loaded engine a `model` parameter names. Raises NotFoundError."""
        if reference is None:
            return self.engine
        try:
            bundle = self.store.resolve(reference)
        except (ModelNotFoundError, BundleError) as error:
            raise NotFoundError(str(error)) from error
        if bundle.digest != self.engine.bundle.digest:
            loaded = self.engine.manifest
            raise NotFoundError(f"{reference} is not loaded; this service runs {loaded.name}@{loaded.version}")
        return self.engine

    async def decode(self, clip: Clip, clock: StageClock, deadline: float) -> audio.Waveform:
        """Decode: what is large or compressed in a worker thread. Raises ServiceError."""
        limits = self.engine.manifest.audio
        longest_s = min(limits.longest_s, self.settings.longest_audio_s)

        def work() -> audio.Waveform:
            return audio.decode(clip.data, clip.content_type, shortest_s=limits.shortest_s, longest_s=longest_s)

        with clock.stage("decode"):
            waveform = work() if _cheap(clip) else await self._within(self.decoders, work, deadline)
        self.metrics.audio_seconds.inc(waveform.duration_s)
        return waveform

    async def infer(self, waveform: audio.Waveform, clock: StageClock, deadline: float) -> Outputs:
        """One clip through the batcher. Raises ServiceError."""
        try:
            async with _until(deadline):
                timed = await self.batcher.submit(waveform, size=waveform.duration_s, deadline=deadline)
        except QueueFullError as error:
            raise OverloadedError(str(error), retry_after_s=error.retry_after_s) from error
        except (ExpiredError, TimeoutError) as error:
            raise DeadlineExceededError(str(error) or "the deadline passed during inference") from error
        except ClosedError as error:
            raise OverloadedError(str(error), retry_after_s=DRAIN_RETRY_AFTER_S) from error
        except CallFailedError as error:
            raise InferenceFailedError("the model failed on this clip; the failure is logged") from error
        clock.record("queue", timed.queue_s)
        clock.record("inference", timed.call_s)
        return timed.value

    async def with_profiles(self, work: Callable[[], T], deadline: float) -> T:
        """Run a database call in its own threads. Raises ServiceError."""
        return await self._within(self.database, work, deadline)

    async def comparing_profiles(self, work: Callable[[], T], deadline: float) -> T:
        """Run a database call that reads many profiles, after those before it. Raises ServiceError."""
        return await self._within(self.comparing, work, deadline)

    async def _within(self, pool: ThreadPoolExecutor, work: Callable[[], T], deadline: float) -> T:
        if time.monotonic() >= deadline:
            raise DeadlineExceededError("the deadline passed before the work began")
        loop = asyncio.get_running_loop()
        try:
            async with _until(deadline):
                return await loop.run_in_executor(pool, work)
        except TimeoutError as error:
            raise DeadlineExceededError("the deadline passed") from error


def _cheap(clip: Clip) -> bool:
    """Whether decoding takes less time than handing it to another thread and back."""
    return len(clip.data) <= INLINE_BYTES and audio.is_plain(clip.data, clip.content_type)


def _until(deadline: float) -> asyncio.Timeout:
    """Raises TimeoutError in the block once `deadline`, on time.monotonic, passes."""
    return asyncio.timeout(deadline - time.monotonic())
