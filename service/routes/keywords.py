"""Keywords in a clip, and the list of those that can be found."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response

from service import keywords as spotting
from service.engine import Engine, Outputs
from service.errors import DeadlineExceededError, InvalidSamplesError, ModelUnusableError, NotFoundError
from service.intake import deadline_of
from service.routes.common import (
    AUDIO_ERRORS,
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
from service.schemas import DetectAnswer, DetectionInfo, KeywordEntry, KeywordsAnswer, RankedKeyword

router = APIRouter(prefix="/v1/keywords", tags=["keywords"], route_class=DirectRoute)

KeywordsParameter = Annotated[
    list[str], Query(max_length=500, description="Labels such as `en:computer`; default all.")
]
ThresholdParameter = Annotated[
    float | None, Query(ge=0, le=1, allow_inf_nan=False, description="In place of each keyword's own threshold.")
]
TopParameter = Annotated[int, Query(ge=0, le=500, description="Length of the clip-level ranking.")]

DETECT_EXAMPLE = {
    "model": {"name": "sotto-edge", "version": 1},
    "duration_s": 1.0,
    "detections": [{"keyword": "en:computer", "score": 0.97, "start_s": 0.21, "end_s": 0.83}],
    "top": [{"keyword": "en:computer", "score": 0.97}, {"keyword": "ar:stop", "score": 0.01}],
}


@router.post(
    "/detect",
    summary="Find keywords in a clip, with times",
    response_model=DetectAnswer,
    response_model_exclude_none=True,
    responses={
        200: {"content": {"application/json": {"example": DETECT_EXAMPLE}}},
        **problems(*AUDIO_ERRORS, InvalidSamplesError, NotFoundError),
    },
    openapi_extra=audio_body(several=False),
)
async def detect(
    request: Request,
    caller: Infers,  # noqa: ARG001  the check is what it is for
    model: ModelParameter = None,
    keywords: KeywordsParameter = [],  # noqa: B006  FastAPI copies it
    threshold: ThresholdParameter = None,
    top_k: TopParameter = 5,
) -> Response:
    """Events above threshold, in time order, for clips of any allowed length; and the clip-level ranking."""
    runtime, clock = runtime_of(request), clock_of(request)
    deadline = deadline_of(request, runtime.settings)
    engine = await runtime.engine_for(model, deadline)
    allowed = allowed_labels(engine, keywords)
    (clip,) = await runtime.uploads.receive(request, clock, deadline, at_most=1)
    waveform = await runtime.decode(engine, clip, clock, deadline)
    outputs = await runtime.infer(engine, waveform, clock, deadline, "keywords")
    with clock.stage("postprocess"):
        detections, top = spot(engine, outputs, waveform.duration_s, allowed, threshold, top_k)
        for detection in detections:
            runtime.metrics.detections.labels(detection.keyword).inc()
        body = DetectAnswer(model=model_info(engine), duration_s=waveform.duration_s, detections=detections, top=top)
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")


@router.get(
    "",
    summary="List the keywords that can be detected",
    response_model=KeywordsAnswer,
    responses={
        200: {
            "content": {
                "application/json": {
                    "example": {
                        "model": {"name": "sotto-edge", "version": 1},
                        "thresholds_from": "speakers set aside from training",
                        "keywords": [
                            {"keyword": "en:computer", "language": "en", "word": "computer", "threshold": 0.5}
                        ],
                    }
                }
            }
        },
        **problems(NotFoundError, ModelUnusableError, DeadlineExceededError),
    },
)
async def list_keywords(request: Request, caller: Infers, model: ModelParameter = None) -> Response:  # noqa: ARG001  asks for the scope
    """Labels, thresholds, and what the thresholds were fitted on."""
    runtime = runtime_of(request)
    engine = await runtime.engine_for(model, deadline_of(request, runtime.settings))
    info = engine.manifest.keywords
    entries = []
    for keyword in info.labels:
        language, word = keyword.label.split(":", 1)
        entries.append(KeywordEntry(keyword=keyword.label, language=language, word=word, threshold=keyword.threshold))
    return answer(KeywordsAnswer(model=model_info(engine), thresholds_from=info.thresholds_from, keywords=entries))


def allowed_labels(engine: Engine, wanted: list[str]) -> npt.NDArray[np.bool_]:
    """Mask of the labels asked for. Raises NotFoundError for one that the model does not know."""
    if not wanted:
        return engine.every_keyword
    try:
        return spotting.allowed_labels(engine.manifest.keywords, wanted)
    except KeyError as error:
        raise NotFoundError(f"no keyword {str(error.args[0])[:80]!r}; GET /v1/keywords lists them") from error


def spot(
    engine: Engine,
    outputs: Outputs,
    duration_s: float,
    allowed: npt.NDArray[np.bool_],
    threshold: float | None,
    top_k: int,
) -> tuple[list[DetectionInfo], list[RankedKeyword]]:
    """Detections and ranking of one clip, as the response shows them."""
    info = engine.manifest.keywords
    evidence = spotting.weigh(outputs.keyword_logits, info)
    least = engine.thresholds if threshold is None else threshold
    found = spotting.detect(evidence, info, duration_s, allowed, least)
    ranked = spotting.rank(evidence, info, top_k, allowed)
    return [rounded(event) for event in found], [
        RankedKeyword(keyword=item.keyword, score=round(item.score, 4)) for item in ranked
    ]


def rounded(event: spotting.Detection) -> DetectionInfo:
    """As a response shows it: scores to four places, times to a millisecond."""
    return DetectionInfo(
        keyword=event.keyword,
        score=round(event.score, 4),
        start_s=round(event.start_s, 3),
        end_s=round(event.end_s, 3),
    )
