"""Which of the enrolled speakers a clip is spoken by, if any."""

from __future__ import annotations

import heapq
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import StringConstraints

from service.engine import Engine, Outputs
from service.errors import (
    ModelMismatchError,
    NotFoundError,
    ProfileIncompleteError,
)
from service.intake import deadline_of
from service.routes.common import (
    CLAIM_ERRORS,
    SPEAKER_ID,
    FalseAcceptRateParameter,
    Infers,
    ModelParameter,
    answer,
    audio_body,
    clock_of,
    model_info,
    problems,
    runtime_of,
)
from service.routes.direct import DirectRoute
from service.routes.speakers import MODEL_EXAMPLE, check_ready, figures_of, voice_of
from service.runtime import Runtime
from service.schemas import IdentifiedCandidate, IdentifyAnswer
from service.speakers import scoring
from service.speakers.roster import PAGE, Found, Scored, TooManyError, vector_of
from service.speakers.store import Profile

router = APIRouter(prefix="/v1/speakers", tags=["speakers"], route_class=DirectRoute)

MOST_NAMED = 1000
EXAMPLE = {
    "candidates": [
        {"speaker_id": "ada", "score": 4.1, "probability": 0.98, "cosine": 0.71},
        {"speaker_id": "grace", "score": -5.2, "probability": 0.01, "cosine": 0.18},
    ],
    "identified": "ada",
    "compared": 2,
    "skipped": 0,
    "threshold": 0.0,
    "speech_s": 1.8,
    "snr_db": 21.5,
    "model": MODEL_EXAMPLE,
}


@router.post(
    "/identify",
    summary="Whose voice is this?",
    response_model=IdentifyAnswer,
    responses={
        200: {"content": {"application/json": {"example": EXAMPLE}}},
        **problems(*CLAIM_ERRORS),
    },
    openapi_extra=audio_body(several=False),
)
async def identify(
    request: Request,
    caller: Infers,
    candidates: Annotated[
        list[Annotated[str, StringConstraints(pattern=SPEAKER_ID)]],
        Query(
            default_factory=list,
            max_length=MOST_NAMED,
            description="Speaker ids, repeated; default: every speaker of yours that is enrolled with this model.",
        ),
    ],
    top_k: Annotated[int, Query(ge=1, le=MOST_NAMED, description="How many of the best to return.")] = 5,
    false_accept_rate: FalseAcceptRateParameter = None,
    model: ModelParameter = None,
) -> Response:
    """Scores are those of verify. The more candidates, the likelier a stranger's best one reaches the threshold.

    `skipped` counts speakers that are still enrolling or were enrolled with another model. Everyone's vectors are kept
    in memory, up to a limit, and follow every change; the first request after a start reads them all, and what it has
    read when its deadline passes, the next need not read.
    """
    runtime, clock = runtime_of(request), clock_of(request)
    deadline = deadline_of(request, runtime.settings)
    engine = await runtime.profiles_engine(model, deadline)
    threshold = engine.accepts_from(false_accept_rate)
    (clip,) = await runtime.uploads.receive(request, clock, deadline, at_most=1)
    outputs, quality = await voice_of(runtime, engine, clip, clock, deadline)
    with clock.stage("postprocess"):
        if candidates:
            named = list(dict.fromkeys(candidates))
            work = partial(_named, runtime, engine, caller.tenant, named, outputs)
            scored = await runtime.profile_threads.compare(work, deadline)
            found = Found(_best(top_k, scored), len(scored), 0)
        else:
            found = await _best_of_all(runtime, engine, caller.tenant, outputs, top_k, deadline)
    best = found.best
    identified = best[0][0] if best and best[0][1].llr >= threshold else None
    runtime.metrics.identifications.labels("unknown" if identified is None else "identified").inc()
    return answer(
        IdentifyAnswer(
            candidates=[
                IdentifiedCandidate(speaker_id=speaker_id, **figures_of(score, runtime.settings.prior))
                for speaker_id, score in best
            ],
            identified=identified,
            compared=found.compared,
            skipped=found.skipped,
            threshold=threshold,
            speech_s=round(quality.speech_s, 3),
            snr_db=round(quality.snr_db, 1),
            model=model_info(engine),
        )
    )


def _named(runtime: Runtime, engine: Engine, tenant: str, ids: list[str], outputs: Outputs) -> list[Scored]:
    """Whoever is asked for by name must be there and ready. Blocking. Raises NotFoundError, ProfileIncompleteError,
    ModelMismatchError."""
    scored: list[Scored] = []
    for first in range(0, len(ids), PAGE):
        page = ids[first : first + PAGE]
        profiles = runtime.profiles.named(tenant, page)
        missing = sorted(set(page) - {profile.speaker_id for profile in profiles})
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise NotFoundError(f"no speaker {', '.join(map(repr, missing[:5]))}{more}")
        for profile in profiles:
            check_ready(runtime, engine, profile)
        scored += _scored(engine, profiles, outputs)
    return scored


async def _best_of_all(
    runtime: Runtime, engine: Engine, tenant: str, outputs: Outputs, top_k: int, deadline: float
) -> Found:
    """In steps, so that others get their turn and a deadline can pass in between; what was read by then is kept."""
    step = partial(runtime.rosters.best, tenant, engine, outputs.speaker_embedding, top_k)
    try:
        while True:
            found = await runtime.profile_threads.compare(step, deadline)
            if found is not None:
                return found
    except TooManyError:
        return await _best_by_page(runtime, engine, tenant, outputs, top_k, deadline)


async def _best_by_page(
    runtime: Runtime, engine: Engine, tenant: str, outputs: Outputs, top_k: int, deadline: float
) -> Found:
    """Of more than fit into memory: read anew each time."""

    def page(after: str) -> tuple[list[Profile], list[Scored]]:
        found = runtime.profiles.list(tenant, after=after, limit=PAGE)
        return found, _scored(engine, [one for one in found if _is_ready(runtime, engine, one)], outputs)

    best: list[Scored] = []
    after, compared, skipped = "", 0, 0
    while True:
        found, scored = await runtime.profile_threads.compare(partial(page, after), deadline)
        best = _best(top_k, [*best, *scored])
        compared += len(scored)
        skipped += len(found) - len(scored)
        if len(found) < PAGE:
            return Found(best, compared, skipped)
        after = found[-1].speaker_id


def _is_ready(runtime: Runtime, engine: Engine, profile: Profile) -> bool:
    try:
        check_ready(runtime, engine, profile)
    except (ProfileIncompleteError, ModelMismatchError):
        return False
    return True


def _scored(engine: Engine, profiles: list[Profile], outputs: Outputs) -> list[Scored]:
    if not profiles:
        return []
    vectors = np.stack([vector_of(profile) for profile in profiles])
    found = scoring.scores(vectors, outputs.speaker_embedding, engine.speaker, engine.cohort)
    return [(profile.speaker_id, score) for profile, score in zip(profiles, found, strict=True)]


def _best(top_k: int, scored: list[Scored]) -> list[Scored]:
    return heapq.nsmallest(top_k, scored, key=lambda one: (-one[1].llr, one[0]))
