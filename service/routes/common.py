"""What every route shares: its dependencies, its documented errors, its response."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from service.auth import Caller
from service.engine import Engine
from service.errors import (
    PROBLEM_JSON,
    PROBLEM_SCHEMA,
    AudioTooLargeError,
    AudioTooShortError,
    DeadlineExceededError,
    ForbiddenError,
    HeadTooLargeError,
    InferenceFailedError,
    InvalidRequestError,
    InvalidSamplesError,
    MalformedBodyError,
    MalformedRequestError,
    ModelMismatchError,
    ModelUnusableError,
    NoSpeechError,
    NotFoundError,
    OverloadedError,
    ProfileIncompleteError,
    RateLimitedError,
    RequestTooSlowError,
    ServiceError,
    StorageUnavailableError,
    TaskUnsupportedError,
    UnauthenticatedError,
    UndecodableAudioError,
    UnsupportedMediaTypeError,
)
from service.runtime import Runtime
from service.schemas import ModelInfo
from service.timing import StageClock

T = TypeVar("T")

AUDIO_ERRORS: tuple[type[ServiceError], ...] = (
    UndecodableAudioError,
    MalformedBodyError,
    AudioTooLargeError,
    UnsupportedMediaTypeError,
    AudioTooShortError,
    OverloadedError,
    DeadlineExceededError,
    InferenceFailedError,
    RequestTooSlowError,
    ModelUnusableError,
)
# Of any request, before a route sees it, and of what nobody foresaw.
REQUEST_ERRORS: tuple[type[ServiceError], ...] = (
    MalformedRequestError,
    InvalidRequestError,
    RequestTooSlowError,
    HeadTooLargeError,
    OverloadedError,
    ServiceError,
)
CALLER_ERRORS: tuple[type[ServiceError], ...] = (UnauthenticatedError, ForbiddenError, RateLimitedError)
PROFILE_ERRORS: tuple[type[ServiceError], ...] = (StorageUnavailableError, DeadlineExceededError)
# Of any route that holds one clip against profiles.
CLAIM_ERRORS: tuple[type[ServiceError], ...] = (
    *AUDIO_ERRORS,
    *PROFILE_ERRORS,
    InvalidSamplesError,
    NoSpeechError,
    NotFoundError,
    ProfileIncompleteError,
    ModelMismatchError,
    TaskUnsupportedError,
)

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MEDIA_TYPES = ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "audio/pcm;rate=16000")


def problems(*errors: type[ServiceError], keyed: bool = True) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` for these errors and those that any route can give, or any that asks for a key."""
    found: dict[int | str, dict[str, Any]] = {}
    for error in (*REQUEST_ERRORS, *(CALLER_ERRORS if keyed else ()), *errors):
        known = found.setdefault(
            error.status, {"description": "", "content": {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA}}}
        )
        codes = [*known["description"].split(" or "), f"`{error.code}`"]
        known["description"] = " or ".join(dict.fromkeys(code for code in codes if code))
    return found


def audio_body(*, several: bool) -> dict[str, Any]:
    """OpenAPI `requestBody` of an audio route."""
    part: dict[str, Any] = {"type": "string", "format": "binary", "description": "An audio file."}
    if several:
        part = {"type": "array", "items": part, "description": "Audio files; repeat the part."}
    form = {"schema": {"type": "object", "required": ["audio"], "properties": {"audio": part}}}
    content: dict[str, Any] = dict.fromkeys(_MEDIA_TYPES, _BINARY)
    return {"requestBody": {"required": True, "content": {**content, "multipart/form-data": form}}}


def runtime_of(request: HTTPConnection) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def clock_of(request: Request) -> StageClock:
    clock: StageClock = request.state.clock
    return clock


# Dependencies are coroutines because FastAPI sends plain functions through a thread pool, at a tenth of a
# millisecond each.


async def refuse_unknown_query(request: HTTPConnection) -> None:
    """A misspelt parameter must not be silently ignored. Raises InvalidRequestError."""
    if not request.query_params:
        return
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    unknown = sorted(set(request.query_params) - known)
    if unknown:
        raise InvalidRequestError(
            f"unknown query parameters {', '.join(name[:40] for name in unknown[:5])}; "
            f"known are {', '.join(sorted(known)) or 'none'}"
        )


async def may_infer(request: HTTPConnection) -> Caller:
    return runtime_of(request).authenticator.caller(request, "infer")


async def may_enrol(request: Request) -> Caller:
    return runtime_of(request).authenticator.caller(request, "enrol")


async def may_administer(request: Request) -> Caller:
    return runtime_of(request).authenticator.caller(request, "admin")


Infers = Annotated[Caller, Depends(may_infer)]
Enrols = Annotated[Caller, Depends(may_enrol)]
Administers = Annotated[Caller, Depends(may_administer)]
ModelParameter = Annotated[
    str | None, Query(max_length=100, description="`name`, `name@version` or `name@alias`; default: the service's.")
]
FalseAcceptRateParameter = Annotated[
    float | None,
    Query(
        gt=0,
        lt=1,
        description="Decide with the threshold that was fitted for this share of single claims by strangers, 0.01 or "
        "0.001: one of the model's `operating_points`. Default: what is likelier the same voice than not.",
    ),
]
SPEAKER_ID = r"^[A-Za-z0-9][A-Za-z0-9._@:+-]{0,127}$"
SpeakerId = Annotated[str, Path(pattern=SPEAKER_ID, description="Chosen by you; no personal data needed.")]


async def named(index: int, clips: int, work: Awaitable[T]) -> T:
    """The work's result. What is wrong with one clip of several is said with its number, from 0 on."""
    try:
        return await work
    except ServiceError as error:
        if clips > 1 and error.status < 500:
            error.detail = f"clip {index}: {error.detail}"
        raise


def model_info(engine: Engine) -> ModelInfo:
    return ModelInfo(name=engine.manifest.name, version=engine.manifest.version)


def answer(body: BaseModel, status: int = 200) -> Response:
    """Serialised once, by pydantic's own encoder."""
    return Response(body.model_dump_json(), status_code=status, media_type="application/json")
