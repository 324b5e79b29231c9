"""The parts of a running service, built once: model, batcher, decoders, profiles."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from model_store import Bundle, LocalStore, StoreError
from model_store.graph import part_of
from model_store.inference import is_available
from model_store.streaming import ENDLESS, Chunk
from service import audio
from service.auth import Authenticator
from service.batching import Batcher
from service.deadlines import until, within
from service.decoders import INLINE_BYTES, Decoders
from service.engine import PARTS, Engine, Outputs, Part, Task
from service.errors import (
    ClientGoneError,
    DeadlineExceededError,
    InferenceFailedError,
    OverloadedError,
)
from service.intake import Clip, Uploads
from service.jobs import Advanced, BatchObserver, Job, Step, run_batch
from service.live import LiveStreams
from service.metrics import Metrics
from service.models import Models
from service.probe import Threads, choose_threads, clips_a_call, standby
from service.queueing import (
    AbandonedError,
    CallFailedError,
    ClosedError,
    ExpiredError,
    Limits,
    Priority,
    QueueFullError,
)
from service.settings import Settings, available_cpus
from service.speakers.roster import Rosters
from service.speakers.spaces import Spaces
from service.speakers.store import ProfileStore
from service.speakers.threads import ProfileThreads
from service.timing import StageClock

T = TypeVar("T")
DRAIN_RETRY_AFTER_S = 1.0
LOADING_RETRY_AFTER_S = 2.0
LAG_EVERY_S = 0.25
# Of one graph call before the first request; larger ones find their memory when they come. With sixteen the start
# would take a fourth of a second more.
MOST_WARMED = 8
STREAM = "stream"
# A stream's words are told a quarter of a second after them at best, so its steps may wait a little for those of
# others: eight in one call cost less than half of eight calls.
STREAM_GATHER_S = 0.02

log = logging.getLogger(__name__)


class Runtime:
    """Everything a route needs. `start` before use, `close` after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.decoders = Decoders(
            settings.decode_threads or available_cpus(),
            hang_s=settings.call_timeout_s,
            hung=self.metrics.worker_failures.labels("decode").inc,
        )
        self.uploads = Uploads(settings, self.metrics, self.decoders)
        self.authenticator = Authenticator(settings)
        self.store = LocalStore(settings.models_dir)
        self.models = Models(
            self.store,
            settings.model,
            load=self._load,
            load_on_request=settings.load_on_request,
            most_bytes=settings.models_memory_bytes,
            became_default=self._became_default,
            unloaded=self._unloaded,
        )
        self.intra_op_threads = settings.intra_op_threads or 1
        self.streams = LiveStreams(self.metrics.streams)
        self.started = False
        self.closed = True
        self.draining = False
        self._failed: list[str] = []

    def start(self) -> None:
        """Load and warm the model, open the database. Blocking.

        Raises model_store.StoreError and StorageUnavailableError: better not to start than to start lame.
        """
        settings = self.settings
        cpus = available_cpus()
        if not is_available(settings.provider):
            raise StoreError(f"SOTTO_PROVIDER={settings.provider}: this ONNX Runtime cannot; install onnxruntime-gpu")
        with ThreadPoolExecutor(1) as beside:
            # Most of it waits or imports; the probe after both wants the machine to itself.
            opening = beside.submit(ProfileStore, settings.profiles_url)
            self.models.start()
            self.profiles = opening.result()
        callers = self._choose_threads(cpus)
        self.rosters = Rosters(
            self.profiles,
            required_speech_s=settings.enroll_required_speech_s,
            most_bytes=settings.profiles_memory_bytes,
        )
        self.batcher: Batcher[Job | Step, Outputs | Advanced] = Batcher(
            run_batch,
            workers=callers,
            standby=standby(callers, self.intra_op_threads, cpus) if settings.provider == "cpu" else 0,
            limits=Limits(
                settings.max_batch, settings.max_batch_audio_s, settings.max_queued_audio_s, settings.call_timeout_s
            ),
            observer=BatchObserver(self.metrics),
        )
        self.decoders.start()
        self.profile_threads = ProfileThreads(self.profiles.ping)
        self.spaces = Spaces(self.profiles)
        self.metrics.ready.set(1)
        self.started = True

    @property
    def engine(self) -> Engine:
        """Of requests that name no model."""
        return self.models.default

    def close(self, grace_s: float) -> bool:
        """Finish what is queued, then stop every thread; False where one hangs in the database or the model store.
        Blocking."""
        self.metrics.ready.set(0)
        self.batcher.close(grace_s)
        self.decoders.close(grace_s)
        ended = self.models.close(grace_s)
        if not self.profile_threads.close(grace_s):
            return False
        self.profiles.close()
        return ended

    def checks(self) -> dict[str, bool]:
        """What readiness depends on, each by itself."""
        return {
            "accepting": not self.draining,
            "decoding": self.decoders.alive,
            "inference": self.batcher.alive,
            "profiles": self.profile_threads.answers,
        }

    def is_ready(self, checks: dict[str, bool]) -> bool:
        """Whether requests should be sent here."""
        optional = {"profiles"} if self.settings.ready_without_profiles else set()
        return all(good for name, good in checks.items() if name not in optional)

    @property
    def beyond_repair(self) -> bool:
        """Whether threads hang in calls that never end."""
        return self.batcher.beyond_repair or self.decoders.beyond_repair or self.profile_threads.stuck

    async def engine_for(self, reference: str | None, deadline: float, *tasks: Task) -> Engine:
        """The engine a `model` parameter names, loaded if need be, that can do these tasks. Raises ServiceError."""
        engine = self.models.default
        if reference is not None:
            try:
                async with until(deadline):
                    engine = await self.models.named(reference)
            except TimeoutError as error:
                if not self.models.loading:
                    raise DeadlineExceededError("the deadline passed before the model was looked up") from error
                raise OverloadedError(
                    f"{reference} is still being loaded", retry_after_s=LOADING_RETRY_AFTER_S
                ) from error
        engine.require(*tasks)
        return engine

    async def profiles_engine(self, reference: str | None, deadline: float) -> Engine:
        """The same, of those that are to be held against profiles. Raises ServiceError."""
        engine = await self.engine_for(reference, deadline, "speaker")
        await self.own_space(engine, deadline)
        return engine

    async def own_space(self, engine: Engine, deadline: float) -> None:
        """That profiles of the engine's space are of its network. Raises ServiceError."""
        if not self.spaces.knows(engine):
            await self.profile_threads.call(lambda: self.spaces.require(engine), deadline)

    async def watch(self) -> None:
        """Beside the requests, as long as the service runs: the event loop's lag, decoders that hang, profiles that
        nobody compares any more, and a default alias that moves."""
        refreshed = time.monotonic()
        # By itself, since loading takes seconds and a store on a network may not answer.
        refreshing: asyncio.Task[None] | None = None
        try:
            while True:
                due = time.monotonic() + LAG_EVERY_S
                await asyncio.sleep(LAG_EVERY_S)
                self.metrics.loop_lag.observe(max(0.0, time.monotonic() - due))
                self.decoders.supervise()
                self.rosters.expire()
                self._tell_readiness()
                every_s = self.settings.models_refresh_s
                busy = refreshing is not None and not refreshing.done()
                if every_s and time.monotonic() - refreshed > every_s and not busy:
                    refreshed = time.monotonic()
                    refreshing = asyncio.create_task(self._refresh())
        finally:
            if refreshing is not None:
                refreshing.cancel()
                await asyncio.wait((refreshing,))

    async def _refresh(self) -> None:
        try:
            await self.models.refresh()
        # A store that cannot be read now may be read the next time.
        except Exception:
            log.exception("the model store could not be looked at")

    def _tell_readiness(self) -> None:
        """To the log, and to whoever scrapes metrics without probing."""
        checks = self.checks()
        self.metrics.ready.set(int(self.is_ready(checks)))
        failed = [name for name, good in checks.items() if not good]
        if failed == self._failed or self.draining:
            return
        self._failed = failed
        if failed:
            log.warning("failing checks: %s", ", ".join(failed))
        else:
            log.info("all checks are good again")

    async def decode(self, engine: Engine, clip: Clip, clock: StageClock, deadline: float) -> audio.Waveform:
        """Decode: what is large or compressed in a worker thread. Raises ServiceError."""
        limits = engine.manifest.audio
        longest_s = min(limits.longest_s, self.settings.longest_audio_s)

        def work() -> audio.Waveform:
            return audio.decode(clip.data, clip.content_type, shortest_s=limits.shortest_s, longest_s=longest_s)

        def work_beside() -> audio.Waveform:
            # Whole: what is done with a long clip before it is computed is done on the event loop.
            return audio.Waveform(work().samples)

        with clock.stage("decode"):
            waveform = work() if _cheap(clip) else await within(self.decoders, work_beside, deadline)
        self.metrics.audio_seconds.inc(waveform.duration_s)
        return waveform

    async def infer(
        self,
        engine: Engine,
        waveform: audio.Waveform,
        clock: StageClock,
        deadline: float,
        part: Part = "all",
        *,
        priority: Priority = Priority.CLIP,
    ) -> Outputs:
        """One clip through the batcher. Raises ServiceError."""
        job, group = Job(engine, part, waveform), (engine.bundle.digest, part)
        found = await self._submit(job, waveform.duration_s, group, clock, deadline, priority)
        assert isinstance(found, Outputs)
        return found

    async def advance(
        self, engine: Engine, chunk: Chunk, clock: StageClock, deadline: float, *, priority: Priority
    ) -> Advanced:
        """One stream's next chunk through the batcher. Raises ServiceError."""
        assert engine.streaming is not None
        # Chunks of one length share a call.
        group = (engine.bundle.digest, STREAM, len(chunk.samples))
        step, size = Step(engine.streaming, chunk), len(chunk.samples) / audio.SAMPLE_RATE_HZ
        # What is behind, or ends a stream, has nobody in step with it.
        in_step = priority is Priority.STREAM and chunk.length == ENDLESS
        found = await self._submit(step, size, group, clock, deadline, priority, STREAM_GATHER_S if in_step else 0.0)
        assert isinstance(found, tuple)
        return found

    async def _submit(
        self,
        job: Job | Step,
        size: float,
        group: Hashable,
        clock: StageClock,
        deadline: float,
        priority: Priority,
        gather_s: float = 0.0,
    ) -> Outputs | Advanced:
        """Raises ServiceError."""
        try:
            async with until(deadline):
                timed = await self.batcher.submit(
                    job,
                    size=size,
                    deadline=deadline,
                    group=group,
                    priority=priority,
                    gather_s=gather_s,
                    most=self.clips_a_call if isinstance(job, Job) else None,
                    abandoned=clock.abandoned,
                )
        except AbandonedError as error:
            raise ClientGoneError("the client went away") from error
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

    def _load(self, bundle: Bundle) -> Engine:
        engine = Engine(bundle, intra_op_threads=self.intra_op_threads, provider=self.settings.provider)
        engine.warm_up(min(self.settings.max_batch, MOST_WARMED))
        return engine

    def _choose_threads(self, cpus: int) -> int:
        """Sets threads within a call, of the model that is loaded too; returns the number of calls at once. Raises
        model_store.StoreError."""
        settings = self.settings
        callers, intra_op = settings.inference_threads, settings.intra_op_threads
        if not callers and not intra_op and settings.provider == "cpu":
            chosen = choose_threads(self._keywords_graph(), cpus)
            log.info("graph calls at once, threads in each, seconds of audio a second: %s", chosen.rates)
            callers, intra_op = chosen.callers, chosen.intra_op
        if intra_op > self.intra_op_threads:
            # The first was loaded with one thread, so that it could be asked.
            self.intra_op_threads = intra_op
            self.models.start()
        callers = callers or max(1, cpus // self.intra_op_threads)
        self.clips_a_call = settings.clips_a_call or settings.max_batch
        if not settings.clips_a_call and settings.provider == "cpu":
            threads = Threads(callers, self.intra_op_threads, {})
            self.clips_a_call = clips_a_call(self._keywords_graph(), threads, settings.max_batch)
        self.metrics.inference_threads.set(callers)
        self.metrics.intra_op_threads.set(self.intra_op_threads)
        self.metrics.clips_a_call.set(self.clips_a_call)
        return callers

    def _keywords_graph(self) -> bytes:
        bundle = self.engine.bundle
        return part_of(bundle.read(bundle.manifest.graph.file), PARTS["keywords"])

    def _became_default(self, engine: Engine) -> None:
        manifest = engine.manifest
        self.metrics.model.info(
            {"name": manifest.name, "version": str(manifest.version), "digest": engine.bundle.digest}
        )
        for keyword in manifest.keywords.labels:
            self.metrics.detections.labels(keyword.label)

    def _unloaded(self, engine: Engine) -> None:
        self.batcher.forget(lambda group: isinstance(group, tuple) and group[0] == engine.bundle.digest)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first failure is raised and the others are cancelled: nobody would read them."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _cheap(clip: Clip) -> bool:
    """Whether decoding takes less time than handing it to another thread and back."""
    return len(clip.data) <= INLINE_BYTES and audio.is_plain(clip.data, clip.content_type)
