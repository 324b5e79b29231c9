"""The request's bytes: read to a cap, within the deadline, in any of the accepted forms."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from service.audio import check_media_type
from service.deadlines import until, within
from service.decoders import INLINE_BYTES
from service.errors import (
    AudioTooLargeError,
    DeadlineExceededError,
    InvalidRequestError,
    MalformedBodyError,
    OverloadedError,
    UnsupportedMediaTypeError,
)
from service.metrics import Metrics
from service.multipart import audio_parts
from service.settings import Settings
from service.timing import StageClock

TIMEOUT_HEADER = "x-request-timeout-ms"
# Form fields beside the audio that a client library may add.
OTHER_PARTS = 8
RETRY_AFTER_S = 2.0
# In a request's state: bytes of its body.
HELD = "held"
# In a request's state: says whether all of its body is here.
WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip as it came: encoded bytes and the media type it claims."""

    data: bytes
    content_type: str


def deadline_of(request: Request, settings: Settings) -> float:
    """The request's deadline on time.monotonic. Raises InvalidRequestError for a header that is no number."""
    return time.monotonic() + time_given_s(request.headers.get(TIMEOUT_HEADER), settings)


def time_given_s(asked: str | None, settings: Settings) -> float:
    """What a request may take by its TIMEOUT_HEADER, None where it has none, and by the settings. Raises
    InvalidRequestError for what is no number."""
    if asked is None:
        return settings.request_timeout_s
    if not asked.isascii() or not asked.isdigit() or len(asked) > 9 or int(asked) == 0:
        raise InvalidRequestError(f"X-Request-Timeout-Ms is {asked[:40]!r}; it must be a positive whole number")
    return min(settings.request_timeout_s, int(asked) / 1000)


class Uploads:
    """Receives the bodies of requests, and counts what all of them together hold in memory: a crowd of large ones is
    told to come again before it takes more than there is."""

    def __init__(self, settings: Settings, metrics: Metrics, decoders: Executor) -> None:
        self._settings = settings
        self._decoders = decoders
        self._held = 0
        metrics.upload_bytes.set_function(lambda: self._held)

    async def receive(self, request: Request, clock: StageClock, deadline: float, *, at_most: int) -> list[Clip]:
        """The clips of a raw or multipart body, `at_most` of them. What they take counts until `release`. Raises
        ServiceError."""
        content_type = request.headers.get("content-type", "")
        check_media_type(content_type)
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise UnsupportedMediaTypeError(
                f"Content-Encoding {encoding[:40]!r} is not accepted; audio is compressed already"
            )

        def hold(count: int) -> None:
            self._hold(count, request.scope["state"])

        with clock.stage("receive"):
            body = await read_body(request, self._settings.max_upload_bytes, deadline, hold)
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            return [Clip(body, content_type)]

        def parse() -> list[Clip]:
            parts = audio_parts(body, content_type, at_most=at_most + OTHER_PARTS, deadline=deadline)
            return [Clip(data, kind) for data, kind in parts]

        # A form full of almost-boundaries takes a third of a second for each megabyte.
        with clock.stage("decode"):
            clips = parse() if len(body) <= INLINE_BYTES else await within(self._decoders, parse, deadline)
        if len(clips) > at_most:
            raise MalformedBodyError(f"{len(clips)} parts named `audio`; this route takes up to {at_most}")
        return clips

    def release(self, state: dict[str, Any]) -> None:
        """What the request with this state holds."""
        self._held -= state.pop(HELD, 0)

    def _hold(self, count: int, state: dict[str, Any]) -> None:
        """Raises OverloadedError."""
        if self._held + count > self._settings.uploads_bytes:
            raise OverloadedError("other uploads fill the memory there is for them", retry_after_s=RETRY_AFTER_S)
        state[HELD] = state.get(HELD, 0) + count
        self._held += count


async def read_body(
    request: Request, most: int, deadline: float, hold: Callable[[int], None] = lambda _: None
) -> bytes:
    """`hold` is told of bytes before they are kept. Raises AudioTooLargeError, DeadlineExceededError,
    MalformedBodyError and what `hold` does."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise AudioTooLargeError(f"{declared} bytes; allowed are {most}")
    # One buffer, however many chunks: a flood of six-byte chunks must not become a flood of objects.
    body = bytearray()
    # What is here already cannot be late, and a timer costs a tenth of all that the event loop does for a request.
    whole = request.scope["state"].get(WHOLE, lambda: False)()
    try:
        async with nullcontext() if whole else until(deadline):
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise AudioTooLargeError(f"more than {most} bytes")
                hold(len(chunk))
                body += chunk
    except TimeoutError as error:
        raise DeadlineExceededError("the body did not arrive before the deadline") from error
    except ClientDisconnect as error:
        raise MalformedBodyError("the client went away") from error
    return bytes(body)
