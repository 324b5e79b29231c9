"""Every failure a caller can be told about, as RFC 9457 problem details.

ServiceError
 ├─ 400 UndecodableAudioError     undecodable_audio
 ├─ 400 MalformedBodyError        malformed_body
 ├─ 400 MalformedRequestError     malformed_request
 ├─ 401 UnauthenticatedError      unauthenticated
 ├─ 403 ForbiddenError            forbidden
 ├─ 404 NotFoundError             not_found
 ├─ 408 RequestTooSlowError       request_too_slow
 ├─ 408 StreamIdleError           stream_idle
 ├─ 409 ProfileIncompleteError    profile_incomplete
 ├─ 409 ModelMismatchError        model_mismatch
 ├─ 409 ModelUnusableError        model_unusable
 ├─ 409 TaskUnsupportedError      task_unsupported
 ├─ 413 AudioTooLargeError        audio_too_large
 ├─ 415 UnsupportedMediaTypeError unsupported_media_type
 ├─ 422 AudioTooShortError        audio_too_short
 ├─ 422 NoSpeechError             no_speech
 ├─ 422 InvalidSamplesError       invalid_samples
 ├─ 422 InvalidRequestError       invalid_request
 ├─ 422 InvalidMessageError       invalid_message
 ├─ 429 RateLimitedError          rate_limited, with Retry-After
 ├─ 431 HeadTooLargeError         head_too_large
 ├─ 499 ClientGoneError           client_gone
 ├─ 500 InferenceFailedError      inference_failed
 ├─ 503 OverloadedError           overloaded, with Retry-After
 ├─ 503 StorageUnavailableError   storage_unavailable, with Retry-After
 └─ 504 DeadlineExceededError     deadline_exceeded
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

PROBLEM_JSON = "application/problem+json"
# How routes document their errors; `service.app` puts the schema there.
PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}
PROBLEM_TYPE_PREFIX = "urn:sotto:problem:"


class Problem(BaseModel):
    """RFC 9457 problem details; `code` is stable and meant for programs."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:sotto:problem:undecodable_audio",
                "title": "Audio cannot be decoded",
                "status": 400,
                "detail": "the body is empty",
                "instance": "/v1/keywords/detect",
                "code": "undecodable_audio",
            }
        }
    )

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str


class ServiceError(Exception):
    """Root; each leaf is one status and one code."""

    status = 500
    code = "internal_error"
    title = "Internal error"

    def __init__(self, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s

    def problem(self, instance: str) -> dict[str, Any]:
        """The response body."""
        return {
            "type": PROBLEM_TYPE_PREFIX + self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
            "code": self.code,
        }

    def headers(self) -> dict[str, str]:
        """Extra response headers."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def faults_of(errors: Sequence[Any]) -> str:
    """Where pydantic found fault and why, the first five."""
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in errors[:5])


def problem_response(error: ServiceError, instance: str) -> JSONResponse:
    """The error as a response; also an ASGI application."""
    return JSONResponse(error.problem(instance), error.status, headers=error.headers(), media_type=PROBLEM_JSON)


class UndecodableAudioError(ServiceError):
    """Empty, truncated to nothing, not audio, or audio of a shape that is refused."""

    status, code, title = 400, "undecodable_audio", "Audio cannot be decoded"


class MalformedRequestError(ServiceError):
    """What came is not HTTP."""

    status, code, title = 400, "malformed_request", "Request is malformed"


class InvalidRequestError(ServiceError):
    """A parameter is unknown or out of range."""

    status, code, title = 422, "invalid_request", "Request is not valid"


class MalformedBodyError(ServiceError):
    """A multipart body that breaks off or breaks the rules."""

    status, code, title = 400, "malformed_body", "Body is malformed"


class UnauthenticatedError(ServiceError):
    """No API key, or a wrong one."""

    status, code, title = 401, "unauthenticated", "API key missing or wrong"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServiceError):
    """The key is right but lacks the scope."""

    status, code, title = 403, "forbidden", "Not allowed"


class NotFoundError(ServiceError):
    """Unknown speaker, model, keyword or route."""

    status, code, title = 404, "not_found", "Not found"


class RequestTooSlowError(ServiceError):
    """Head or body came in too slowly."""

    status, code, title = 408, "request_too_slow", "Request too slow"


class HeadTooLargeError(ServiceError):
    """Request line and headers without end."""

    status, code, title = 431, "head_too_large", "Request head too large"


class StreamIdleError(ServiceError):
    """A stream on which nothing came for too long."""

    status, code, title = 408, "stream_idle", "Stream is idle"


class InvalidMessageError(ServiceError):
    """A text message on a stream that means nothing."""

    status, code, title = 422, "invalid_message", "Message is not valid"


class ProfileIncompleteError(ServiceError):
    """The speaker has not enrolled enough speech yet."""

    status, code, title = 409, "profile_incomplete", "Profile is still enrolling"


class ModelMismatchError(ServiceError):
    """The profile was made by another model."""

    status, code, title = 409, "model_mismatch", "Profile was made by another model"


class ModelUnusableError(ServiceError):
    """That version does not pass its checks, or the store cannot be written; what served before still does."""

    status, code, title = 409, "model_unusable", "Model cannot be used"


class TaskUnsupportedError(ServiceError):
    """The model was not made for that, as a model of keywords alone is not for speakers."""

    status, code, title = 409, "task_unsupported", "Model cannot do that"


class AudioTooLargeError(ServiceError):
    """Too many bytes, or too many seconds once decoded."""

    status, code, title = 413, "audio_too_large", "Audio too large"


class UnsupportedMediaTypeError(ServiceError):
    """The media type is neither audio nor multipart."""

    status, code, title = 415, "unsupported_media_type", "Media type not supported"


class AudioTooShortError(ServiceError):
    """Shorter than the model's shortest clip."""

    status, code, title = 422, "audio_too_short", "Audio too short"


class NoSpeechError(ServiceError):
    """Nothing but silence or steady noise where a voice is needed."""

    status, code, title = 422, "no_speech", "No speech found"


class InvalidSamplesError(ServiceError):
    """NaN or infinite samples."""

    status, code, title = 422, "invalid_samples", "Samples are not finite"


class RateLimitedError(ServiceError):
    """Over this key's rate."""

    status, code, title = 429, "rate_limited", "Too many requests"


class ClientGoneError(ServiceError):
    """The client closed the connection while its clip waited; nobody reads this, but metrics count it."""

    status, code, title = 499, "client_gone", "Client went away"


class InferenceFailedError(ServiceError):
    """The model failed on this request; the fault is ours."""

    status, code, title = 500, "inference_failed", "Inference failed"


class OverloadedError(ServiceError):
    """The queue is full or the wait would pass the deadline; come back after Retry-After."""

    status, code, title = 503, "overloaded", "Overloaded"


class StorageUnavailableError(ServiceError):
    """Profiles cannot be read or written right now; nothing was changed."""

    status, code, title = 503, "storage_unavailable", "Profile storage unavailable"


class DeadlineExceededError(ServiceError):
    """The deadline passed before the answer was ready."""

    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"


def codes() -> list[str]:
    """Of every problem that a caller can be told about."""
    return sorted({ServiceError.code, *(kind.code for kind in ServiceError.__subclasses__())})
