"""The request's bytes: read to a cap, within the deadline, in any of the accepted forms."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from service.audio import check_media_type
from service.errors import (
    AudioTooLargeError,
    DeadlineExceededError,
    InvalidRequestError,
    MalformedBodyError,
    UnsupportedMediaTypeError,
)
from service.multipart import audio_parts
from service.settings import Settings
from service.timing import StageClock

TIMEOUT_HEADER = "x-request-timeout-ms"
# Form fields beside the audio that a client library may add.
OTHER_PARTS = 8


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


async def receive_clips(
    request: Request, settings: Settings, clock: StageClock, deadline: float, *, at_most: int
) -> list[Clip]:
    """The clips of a raw or multipart body, `at_most` of them. Raises ServiceError."""
    content_type = request.headers.get("content-type", "")
    check_media_type(content_type)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {encoding[:40]!r} is not accepted; audio is compressed already"
        )
    with clock.stage("receive"):
        body = await read_body(request, settings.max_upload_bytes, deadline)
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        return [Clip(body, content_type)]
    clips = [Clip(data, kind) for data, kind in audio_parts(body, content_type, at_most=at_most + OTHER_PARTS)]
    if len(clips) > at_most:
        raise MalformedBodyError(f"{len(clips)} parts named `audio`; this route takes up to {at_most}")
    return clips


async def read_body(request: Request, most: int, deadline: float) -> bytes:
    """Raises AudioTooLargeError, DeadlineExceededError, MalformedBodyError."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise AudioTooLargeError(f"{declared} bytes; allowed are {most}")
    # One buffer, however many chunks: a flood of six-byte chunks must not become a flood of objects.
    body = bytearray()
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise AudioTooLargeError(f"more than {most} bytes")
                body += chunk
    except TimeoutError as error:
        raise DeadlineExceededError("the body did not arrive before the deadline") from error
    except ClientDisconnect as error:
        raise MalformedBodyError("the client went away") from error
    return bytes(body)
