"""Enrol, verify, list, show and delete speakers."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from service.engine import Engine, Outputs
from service.errors import (
    AudioTooShortError,
    InvalidRequestError,
    InvalidSamplesError,
    ModelMismatchError,
    NoSpeechError,
    NotFoundError,
    ProfileIncompleteError,
    TaskUnsupportedError,
)
from service.intake import Clip, deadline_of
from service.routes.common import (
    AUDIO_ERRORS,
    CLAIM_ERRORS,
    PROFILE_ERRORS,
    Enrols,
    FalseAcceptRateParameter,
    Infers,
    ModelParameter,
    SpeakerId,
    answer,
    audio_body,
    clock_of,
    model_info,
    named,
    problems,
    runtime_of,
)
from service.routes.direct import DirectRoute
from service.runtime import Runtime, together
from service.schemas import Claim, EnrolAnswer, EnrolmentClip, ModelInfo, SpeakerAnswer, SpeakersAnswer, VerifyAnswer
from service.speakers import scoring
from service.speakers.enrolment import UNHEARD, Candidate, judge
from service.speakers.roster import vector_of
from service.speakers.store import Enrolment, Profile
from service.speech import SpeechQuality, measure
from service.timing import StageClock

router = APIRouter(prefix="/v1/speakers", tags=["speakers"], route_class=DirectRoute)

MODEL_EXAMPLE = {"name": "sotto-edge", "version": 1}
ENROL_EXAMPLE = {
    "speaker_id": "ada",
    "status": "enrolled",
    "enrollments": 3,
    "speech_s": 6.4,
    "required_speech_s": 2.0,
    "clips": [{"accepted": True, "speech_s": 2.1, "snr_db": 24.0, "clipped_ratio": 0.0, "reason": None}],
}
VERIFY_EXAMPLE = {
    "speaker_id": "ada",
    "accepted": True,
    "score": 4.1,
    "probability": 0.98,
    "threshold": 0.0,
    "cosine": 0.71,
    "speech_s": 1.8,
    "snr_db": 21.5,
    "model": MODEL_EXAMPLE,
}
SPEAKER_EXAMPLE = {
    "speaker_id": "ada",
    "status": "enrolled",
    "enrollments": 3,
    "speech_s": 6.4,
    "required_speech_s": 2.0,
    "models": [MODEL_EXAMPLE],
    "created_at": "2026-11-20T12:00:00Z",
    "updated_at": "2026-11-20T12:05:00Z",
}


@router.post(
    "/{speaker_id}/enrollments",
    summary="Add clips to a speaker's profile",
    response_model=EnrolAnswer,
    responses={
        200: {"content": {"application/json": {"example": ENROL_EXAMPLE}}},
        **problems(
            *AUDIO_ERRORS, *PROFILE_ERRORS, InvalidSamplesError, ModelMismatchError, NotFoundError, TaskUnsupportedError
        ),
    },
    openapi_extra=audio_body(several=True),
)
async def enrol(request: Request, caller: Enrols, speaker_id: SpeakerId, model: ModelParameter = None) -> Response:
    """Creates the profile when new. Each clip is judged by itself; a refused one leaves no trace. Where one cannot be
    decoded, none is taken."""
    runtime, clock = runtime_of(request), clock_of(request)
    deadline = deadline_of(request, runtime.settings)
    engine = await runtime.profiles_engine(model, deadline)
    clips = await runtime.uploads.receive(request, clock, deadline, at_most=runtime.settings.clips_per_request)
    candidates = await together(
        named(index, len(clips), _candidate(runtime, engine, clip, clock, deadline)) for index, clip in enumerate(clips)
    )
    # Not the engine: it may be unloaded while others write.
    info, cohort, space = engine.speaker, engine.cohort, engine.space
    report: list[EnrolmentClip] = []

    def accept(profile: Profile | None) -> list[Enrolment]:
        before = [] if profile is None else [entry.embedding for entry in _same_space(profile, space)]
        verdicts = judge(candidates, before, info, cohort)
        report[:] = [
            _clip_report(candidate.quality, None if verdict is None else verdict.value)
            for candidate, verdict in zip(candidates, verdicts, strict=True)
        ]
        model_name, model_version = space
        return [
            Enrolment(
                model_name=model_name,
                model_version=model_version,
                embedding=candidate.embedding,
                speech_s=candidate.quality.speech_s,
                snr_db=candidate.quality.snr_db,
            )
            for candidate, verdict in zip(candidates, verdicts, strict=True)
            if verdict is None and candidate.embedding is not None
        ]

    profile = await runtime.profile_threads.call(
        lambda: runtime.profiles.enrol(caller.tenant, speaker_id, accept), deadline
    )
    for clip_report in report:
        runtime.metrics.enrolment_clips.labels(clip_report.reason or "accepted").inc()
    required_s = runtime.settings.enroll_required_speech_s
    speech_s = 0.0 if profile is None else profile.speech_s
    return answer(
        EnrolAnswer(
            speaker_id=speaker_id,
            status=_status(speech_s, required_s),
            enrollments=0 if profile is None else len(profile.enrolments),
            speech_s=round(speech_s, 3),
            required_speech_s=required_s,
            clips=report,
        )
    )


@router.post(
    "/{speaker_id}/verify",
    summary="Is this clip spoken by that speaker?",
    response_model=VerifyAnswer,
    responses={
        200: {"content": {"application/json": {"example": VERIFY_EXAMPLE}}},
        **problems(*CLAIM_ERRORS),
    },
    openapi_extra=audio_body(several=False),
)
async def verify(
    request: Request,
    caller: Infers,
    speaker_id: SpeakerId,
    false_accept_rate: FalseAcceptRateParameter = None,
    model: ModelParameter = None,
) -> Response:
    """`score` is a log-likelihood ratio: 0 means as likely the same voice as not, at even priors."""
    runtime, clock = runtime_of(request), clock_of(request)
    deadline = deadline_of(request, runtime.settings)
    engine = await runtime.profiles_engine(model, deadline)
    threshold = engine.accepts_from(false_accept_rate)
    profile = await ready_profile(runtime, engine, caller.tenant, speaker_id, deadline)
    (clip,) = await runtime.uploads.receive(request, clock, deadline, at_most=1)
    outputs, quality = await voice_of(runtime, engine, clip, clock, deadline)
    with clock.stage("postprocess"):
        claim = decide(runtime, engine, profile, outputs, threshold)
    return answer(
        VerifyAnswer(
            **claim.model_dump(),
            speech_s=round(quality.speech_s, 3),
            snr_db=round(quality.snr_db, 1),
            model=model_info(engine),
        )
    )


@router.get(
    "",
    summary="List speakers",
    response_model=SpeakersAnswer,
    responses={
        200: {"content": {"application/json": {"example": {"speakers": [SPEAKER_EXAMPLE], "next_cursor": None}}}},
        **problems(*PROFILE_ERRORS),
    },
)
async def list_speakers(
    request: Request,
    caller: Infers,
    cursor: Annotated[str | None, Query(max_length=256, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """In order of their ids, page by page."""
    runtime = runtime_of(request)
    after = "" if cursor is None else _read_cursor(cursor)
    deadline = deadline_of(request, runtime.settings)
    found = await runtime.profile_threads.call(
        lambda: runtime.profiles.list(caller.tenant, after=after, limit=limit + 1), deadline
    )
    page = found[:limit]
    following = _cursor(page[-1].speaker_id) if len(found) > limit else None
    return answer(SpeakersAnswer(speakers=[_describe(runtime, profile) for profile in page], next_cursor=following))


@router.get(
    "/{speaker_id}",
    summary="Show a speaker",
    response_model=SpeakerAnswer,
    responses={
        200: {"content": {"application/json": {"example": SPEAKER_EXAMPLE}}},
        **problems(*PROFILE_ERRORS, NotFoundError),
    },
)
async def show_speaker(request: Request, caller: Infers, speaker_id: SpeakerId) -> Response:
    """Never the embeddings themselves."""
    runtime = runtime_of(request)
    profile = await find_profile(runtime, caller.tenant, speaker_id, deadline_of(request, runtime.settings))
    return answer(_describe(runtime, profile))


@router.delete(
    "/{speaker_id}",
    summary="Delete a speaker",
    status_code=204,
    response_class=Response,
    responses={
        204: {
            "description": "The speaker is gone; every byte of it, once a database other than SQLite reuses its pages."
        },
        **problems(*PROFILE_ERRORS, NotFoundError),
    },
)
async def delete_speaker(request: Request, caller: Enrols, speaker_id: SpeakerId) -> Response:
    """A second delete is 404."""
    runtime = runtime_of(request)
    deadline = deadline_of(request, runtime.settings)

    def remove() -> bool:
        found = runtime.profiles.delete(caller.tenant, speaker_id)
        runtime.rosters.forget(caller.tenant, speaker_id)
        return found

    if not await runtime.profile_threads.call(remove, deadline):
        raise NotFoundError(f"no speaker {speaker_id!r}")
    return Response(status_code=204)


async def find_profile(runtime: Runtime, tenant: str, speaker_id: str, deadline: float) -> Profile:
    """Raises NotFoundError."""
    profile = await runtime.profile_threads.call(lambda: runtime.profiles.get(tenant, speaker_id), deadline)
    if profile is None:
        raise NotFoundError(f"no speaker {speaker_id!r}")
    return profile


async def ready_profile(runtime: Runtime, engine: Engine, tenant: str, speaker_id: str, deadline: float) -> Profile:
    """A profile that can be verified against. Raises NotFoundError, ProfileIncompleteError, ModelMismatchError."""
    profile = await find_profile(runtime, tenant, speaker_id, deadline)
    check_ready(runtime, engine, profile)
    return profile


def check_ready(runtime: Runtime, engine: Engine, profile: Profile) -> None:
    """Raises ProfileIncompleteError, ModelMismatchError."""
    _same_space(profile, engine.space)
    required_s = runtime.settings.enroll_required_speech_s
    if profile.speech_s < required_s:
        raise ProfileIncompleteError(
            f"{profile.speaker_id}: {profile.speech_s:.2f} s of speech enrolled, {required_s:.2f} s required; add clips"
        )


def decide(runtime: Runtime, engine: Engine, profile: Profile, outputs: Outputs, threshold: float) -> Claim:
    """Whether the clip's voice is the profile's, counted in the metrics."""
    claimed = score_against(engine, profile, outputs)
    accepted = claimed.llr >= threshold
    runtime.metrics.verifications.labels("accepted" if accepted else "rejected").inc()
    return Claim(
        speaker_id=profile.speaker_id,
        accepted=accepted,
        threshold=threshold,
        **figures_of(claimed, runtime.settings.prior),
    )


def figures_of(claimed: scoring.Score, prior: float) -> dict[str, float]:
    """As answers give a score."""
    return {
        "score": round(claimed.llr, 4),
        "probability": round(scoring.probability(claimed.llr, prior), 6),
        "cosine": round(claimed.cosine, 5),
    }


def score_against(engine: Engine, profile: Profile, outputs: Outputs) -> scoring.Score:
    """The claim's score."""
    return scoring.score(vector_of(profile), outputs.speaker_embedding, engine.speaker, engine.cohort)


def _same_space(profile: Profile, own: tuple[str, int]) -> tuple[Enrolment, ...]:
    strange = {(entry.model_name, entry.model_version) for entry in profile.enrolments} - {own}
    if strange:
        name, version = sorted(strange)[0]
        raise ModelMismatchError(
            f"{profile.speaker_id}: the profile is one of {name}@{version}, this model's are those of "
            f"{own[0]}@{own[1]}, and enrolment audio is not kept; delete the speaker and enrol again"
        )
    return profile.enrolments


async def voice_of(
    runtime: Runtime, engine: Engine, clip: Clip, clock: StageClock, deadline: float
) -> tuple[Outputs, SpeechQuality]:
    """Raises NoSpeechError where the clip holds none."""
    waveform = await runtime.decode(engine, clip, clock, deadline)
    quality = measure(waveform)
    if quality.speech_s == 0:
        raise NoSpeechError("the clip holds silence or steady noise only")
    return await runtime.infer(engine, waveform, clock, deadline, "speaker"), quality


async def _candidate(runtime: Runtime, engine: Engine, clip: Clip, clock: StageClock, deadline: float) -> Candidate:
    try:
        waveform = await runtime.decode(engine, clip, clock, deadline)
    except AudioTooShortError:
        return Candidate(UNHEARD, None)
    quality = measure(waveform)
    outputs = await runtime.infer(engine, waveform, clock, deadline, "speaker")
    return Candidate(quality, outputs.speaker_embedding)


def _clip_report(quality: SpeechQuality, reason: str | None) -> EnrolmentClip:
    return EnrolmentClip.model_validate(
        {
            "accepted": reason is None,
            "speech_s": round(quality.speech_s, 3),
            "snr_db": round(quality.snr_db, 1),
            "clipped_ratio": round(quality.clipped_ratio, 5),
            "reason": reason,
        }
    )


def _describe(runtime: Runtime, profile: Profile) -> SpeakerAnswer:
    required_s = runtime.settings.enroll_required_speech_s
    models = sorted({(entry.model_name, entry.model_version) for entry in profile.enrolments})
    return SpeakerAnswer(
        speaker_id=profile.speaker_id,
        status=_status(profile.speech_s, required_s),
        enrollments=len(profile.enrolments),
        speech_s=round(profile.speech_s, 3),
        required_speech_s=required_s,
        models=[ModelInfo(name=name, version=version) for name, version in models],
        created_at=profile.created_at,
        updated_at=profile.updated_at,
    )


def _status(speech_s: float, required_s: float) -> Literal["enrolling", "enrolled"]:
    return "enrolled" if speech_s >= required_s else "enrolling"


def _cursor(speaker_id: str) -> str:
    return base64.urlsafe_b64encode(speaker_id.encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> str:
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError("cursor is not one that this service gave out") from error
