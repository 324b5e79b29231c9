"""`WS /v1/keywords/stream`: a microphone in, keywords out as they are said.

One coroutine a stream: it receives, computes and sends in turn, so a reader or a sender that does not keep up is held
back by TCP and costs one message of memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Annotated, cast

import numpy as np
import numpy.typing as npt
import soxr
from fastapi import APIRouter, Depends, Query, WebSocket, WebSocketDisconnect

from service.audio import (
    HIGHEST_PCM_RATE_HZ,
    LOWEST_PCM_RATE_HZ,
    SAMPLE_RATE_HZ,
    Samples,
    Waveform,
    pcm_samples,
)
from service.auth import BEARER_PROTOCOL
from service.engine import Engine
from service.errors import (
    DeadlineExceededError,
    InvalidMessageError,
    OverloadedError,
    ServiceError,
    StreamIdleError,
)
from service.keywords import Detection
from service.pacing import AHEAD_S, Pacing
from service.queueing import Priority
from service.routes.common import ModelParameter, may_infer, model_info, runtime_of
from service.routes.keywords import KeywordsParameter, ThresholdParameter, allowed_labels, rounded
from service.runtime import Runtime, together
from service.streaming import FrameStream, Pace, Piece, Spotter, Window, WindowStream
from service.timing import StageClock
from service.websocket import GATHERING, Gathering

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/keywords", tags=["keywords"])

NORMAL, UNSUPPORTED, POLICY, INTERNAL, RESTART, TRY_LATER = 1000, 1003, 1008, 1011, 1012, 1013
RETRY_AFTER_S = 5.0


@router.websocket("/stream", dependencies=[Depends(may_infer)])
async def stream(
    websocket: WebSocket,
    rate: Annotated[int, Query(ge=LOWEST_PCM_RATE_HZ, le=HIGHEST_PCM_RATE_HZ)] = SAMPLE_RATE_HZ,
    keywords: KeywordsParameter = [],  # noqa: B006  FastAPI copies it
    threshold: ThresholdParameter = None,
    model: ModelParameter = None,
) -> None:
    """Binary messages of signed 16-bit little-endian mono PCM, of any size; detections as JSON."""
    runtime = runtime_of(websocket)
    if runtime.draining:
        raise OverloadedError("the service is shutting down", retry_after_s=RETRY_AFTER_S)
    if len(runtime.streams) >= runtime.settings.max_streams:
        raise OverloadedError(f"{len(runtime.streams)} streams are open", retry_after_s=RETRY_AFTER_S)
    with runtime.streams.counting():
        engine = await runtime.engine_for(model, time.monotonic() + runtime.settings.request_timeout_s)
        one = _Stream(websocket, runtime, engine, rate, allowed_labels(engine, keywords), threshold)
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(BEARER_PROTOCOL if BEARER_PROTOCOL in offered else None)
        try:
            with runtime.streams.finishing(one.finish):
                await one.run()
        except WebSocketDisconnect:
            pass
        except ServiceError as failure:
            await _end_with(websocket, runtime, failure)
        except Exception:
            log.exception("a stream failed")
            await _end_with(websocket, runtime, ServiceError("the service failed here; the failure is logged"))


class _Stream:
    """One connection: its audio as it comes, and the state of its keywords."""

    def __init__(
        self,
        websocket: WebSocket,
        runtime: Runtime,
        engine: Engine,
        rate_hz: int,
        allowed: npt.NDArray[np.bool_],
        threshold: float | None,
    ) -> None:
        self._websocket, self._runtime, self._engine = websocket, runtime, engine
        self._rate_hz = rate_hz
        self._resampler = None
        if rate_hz != SAMPLE_RATE_HZ:
            self._resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
        info, pace, shortest_s = engine.manifest.keywords, Pace(), engine.manifest.audio.shortest_s
        spotter = Spotter(info, pace, allowed, threshold)
        self._keywords: WindowStream | FrameStream
        if engine.streaming is None:
            self._keywords = WindowStream(info, pace, spotter, shortest_s=shortest_s)
        else:
            self._keywords = FrameStream(info, pace, spotter, engine.streaming, shortest_s=shortest_s)
        # What is too little to wake us for; `websocket.py` puts it there. Under another server nothing is.
        found = websocket.scope.get("state", {}).get(GATHERING)
        self._gathering: Gathering = found or Gathering(lambda _data, _messages: None)
        self._deliveries = 0
        # What is not taken for samples yet.
        self._unheard = bytearray()
        self._samples = self._resampled = 0
        self._pacing = Pacing(time.monotonic())
        # While the next message is waited for.
        self._idle_since: float | None = None
        self._waiting: asyncio.Timeout | None = None
        # While nothing is under way that an end would tear apart: also where the next message is not read yet.
        self._resting = False
        self._waited = False
        self._finishing = self._ended = False

    def finish(self) -> None:
        """Tell what was heard and end, as the service does."""
        self._finishing = True
        if self._resting and self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Until the client ends it, or `finish`. Raises WebSocketDisconnect, ServiceError."""
        idle_s = self._runtime.settings.stream_idle_s
        # One timer for all messages: a timer of its own for each took a twelfth of the event loop's time.
        try:
            async with asyncio.timeout(None) as waiting:
                self._waiting = waiting
                watching = asyncio.create_task(self._end_when_idle(waiting, idle_s))
                try:
                    await self._converse()
                finally:
                    watching.cancel()
        except TimeoutError as error:
            if not waiting.expired():
                raise
            if not self._finishing:
                raise StreamIdleError(f"nothing came for {idle_s:g} s") from error
            # No message asked for what follows, so none has waited for it.
            self._pacing.due = time.monotonic()
        await self._end()

    async def _end_when_idle(self, waiting: asyncio.Timeout, idle_s: float) -> None:
        while True:
            idle_for_s = 0.0
            if self._idle_since is not None:
                idle_for_s = time.monotonic() - max(self._idle_since, self._gathering.heard_at)
            if idle_for_s >= idle_s:
                waiting.reschedule(asyncio.get_running_loop().time())
                # Unless a message comes in this very turn of the loop: then it goes on.
                idle_for_s = 0.0
            await asyncio.sleep(idle_s - idle_for_s)

    async def _converse(self) -> None:
        await self._send({"type": "ready", "model": model_info(self._engine).model_dump(), "rate": self._rate_hz})
        while not self._finishing:
            message = await self._next()
            if isinstance(message, bytes):
                samples = self._heard(message)
                if len(samples):
                    await self._spot(list(self._keywords.push(self._resample(samples))))
            elif message == "ping":
                await self._send({"type": "pong"})
            else:
                self._ended = True
                return

    async def _end(self) -> None:
        # Not after an "end", nor after something that is not read any more.
        follows = self._finishing and not self._ended and self._deliveries == self._gathering.delivered
        unheard = self._gathering.take() if follows else b""
        rest = self._resample(self._heard(unheard, last=True), last=True)
        await self._spot([*self._keywords.push(rest), *self._keywords.flush()])
        await self._send({"type": "end", "duration_s": round(self._samples / self._rate_hz, 3)})
        await _close(self._websocket, self._runtime, RESTART if self._finishing else NORMAL)

    async def _next(self) -> bytes | str:
        """Audio, "ping" or "end", once it is to be read. Nothing else is cut short by `finish`, or for being idle."""
        assert self._waiting is not None
        self._resting = True
        try:
            # Other tasks have their turn between two messages, however many came at once.
            await asyncio.sleep(self._pacing.rest_s(time.monotonic()))
            message = await self._receive()
        finally:
            self._resting = False
        # It was to be cut short in this very turn of the loop, and would be in the midst of what follows.
        self._waiting.reschedule(None)
        return message

    async def _receive(self) -> bytes | str:
        self._idle_since, self._waited = time.monotonic(), False
        # Runs where the message is not there yet.
        noticing = asyncio.get_running_loop().call_soon(self._notice_waiting)
        self._gathering.want(2 * self._least - len(self._unheard))
        message = await self._websocket.receive()
        noticing.cancel()
        self._idle_since = None
        audio_s = len(message.get("bytes") or b"") / (2 * self._rate_hz)
        self._pacing.came(audio_s, time.monotonic(), waited=self._waited, messages=message.get("messages", 1))
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", NORMAL))
        if message.get("bytes") is not None:
            self._deliveries += 1
            return bytes(message["bytes"])
        try:
            said = json.loads(message.get("text") or "")
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or said.get("type") not in ("ping", "end"):
            raise InvalidMessageError('text messages are {"type": "end"} or {"type": "ping"}; audio is binary')
        return str(said["type"])

    def _notice_waiting(self) -> None:
        self._waited = True

    @property
    def _least(self) -> int:
        """Fewer samples than so many complete nothing: a resampler gives no more than it was given, but some of it
        later."""
        owed = self._samples * SAMPLE_RATE_HZ // self._rate_hz - self._resampled
        return max(1, (self._keywords.missing - owed) * self._rate_hz // SAMPLE_RATE_HZ)

    def _heard(self, message: bytes, *, last: bool = False) -> Samples:
        """The samples that have come, once there are enough for something to be computed with them, or the last ones:
        fewer are not worth a look."""
        self._unheard += message
        count = len(self._unheard) // 2
        if count < (1 if last else self._least):
            return np.zeros(0, dtype=np.float32)
        samples = pcm_samples(self._unheard, count=count)
        del self._unheard[: 2 * count]
        self._samples += len(samples)
        self._runtime.metrics.audio_seconds.inc(len(samples) / self._rate_hz)
        return samples

    def _resample(self, samples: Samples, *, last: bool = False) -> Samples:
        found = samples
        if self._resampler is not None:
            found = np.clip(self._resampler.resample_chunk(samples, last=last), -1.0, 1.0)
        self._resampled += len(found)
        return found

    async def _spot(self, parts: Sequence[Window | Piece]) -> None:
        """What a message completed, computed; the detections in their order."""
        if not parts:
            return
        now = time.monotonic()
        priority = Priority.STREAM if self._pacing.ahead_s(now) < AHEAD_S else Priority.CLIP
        deadline = now + self._runtime.settings.request_timeout_s
        if isinstance(self._keywords, FrameStream):
            await self._spot_pieces(self._keywords, cast(Sequence[Piece], parts), deadline, priority)
        else:
            await self._spot_windows(self._keywords, cast(Sequence[Window], parts), deadline, priority)
        self._runtime.metrics.stream_delay.observe(time.monotonic() - self._pacing.due)

    async def _spot_windows(
        self, stream: WindowStream, windows: Sequence[Window], deadline: float, priority: Priority
    ) -> None:
        """All at once: none needs what another gives."""
        clock = StageClock(self._runtime.metrics)
        outputs = await together(
            self._runtime.infer(self._engine, Waveform(window.samples), clock, deadline, "keywords", priority=priority)
            for window in windows
        )
        for window, output in zip(windows, outputs, strict=True):
            await self._tell(stream.settle(window, output.keyword_logits))

    async def _spot_pieces(
        self, stream: FrameStream, pieces: Sequence[Piece], deadline: float, priority: Priority
    ) -> None:
        """One after the other: each begins where the one before has ended."""
        clock = StageClock(self._runtime.metrics)
        for piece in pieces:
            logits, progress = await self._runtime.advance(
                self._engine, stream.chunk(piece), clock, deadline, priority=priority
            )
            await self._tell(stream.settle(piece, logits, progress))

    async def _tell(self, events: Sequence[Detection]) -> None:
        for event in events:
            self._runtime.metrics.detections.labels(event.keyword).inc()
            await self._send({"type": "detection", **rounded(event).model_dump(exclude_none=True)})

    async def _send(self, message: dict[str, object]) -> None:
        await _send(self._websocket, self._runtime, message)


async def _send(websocket: WebSocket, runtime: Runtime, message: dict[str, object]) -> None:
    """Raises DeadlineExceededError where the client does not read."""
    limit_s = runtime.settings.stream_send_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            await websocket.send_text(json.dumps(message, ensure_ascii=False))
    except TimeoutError as error:
        raise DeadlineExceededError(f"the client took no message for {limit_s:g} s") from error


async def _end_with(websocket: WebSocket, runtime: Runtime, error: ServiceError) -> None:
    """Say what went wrong, if the client listens, and close."""
    runtime.metrics.rejects.labels(error.code).inc()
    code = TRY_LATER if isinstance(error, OverloadedError) else INTERNAL if error.status >= 500 else POLICY
    if isinstance(error, InvalidMessageError):
        code = UNSUPPORTED
    try:
        await _send(websocket, runtime, {"type": "error", "code": error.code, "detail": error.detail})
        await _close(websocket, runtime, code)
    except (ServiceError, WebSocketDisconnect, RuntimeError):
        # It is gone, or does not read: `protocol.cut_off_unread` ends the connection.
        return


async def _close(websocket: WebSocket, runtime: Runtime, code: int) -> None:
    """Raises DeadlineExceededError where the client does not read."""
    limit_s = runtime.settings.stream_send_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            await websocket.close(code)
    except TimeoutError as error:
        raise DeadlineExceededError(f"the client took no message for {limit_s:g} s") from error
