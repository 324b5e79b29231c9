"""Several answers from one pass over a clip."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.audio import SAMPLE_RATE_HZ, Waveform
from service.engine import Engine, Part, Task, tasks_of
from service.errors import (
    InvalidRequestError,
    NoSpeechError,
)
from service.intake import deadline_of
from service.routes.common import (
    CLAIM_ERRORS,
    FalseAcceptRateParameter,
    Infers,
    ModelParameter,
    audio_body,
    clock_of,
    model_info,
    problems,
    runtime_of,
)
from service.routes.direct import DirectRoute
from service.routes.keywords import KeywordsParameter, ThresholdParameter, TopParameter, allowed_labels, spot
from service.routes.speakers import decide, ready_profile, score_against
from service.runtime import Runtime
from service.schemas import (
    AnalyzeAnswer,
    AnalyzedEmbedding,
    AnalyzedSpeaker,
    DetectionInfo,
    KeywordsPart,
)
from service.speakers.store import Profile
from service.speech import measure
from service.timing import StageClock

router = APIRouter(prefix="/v1/analyze", tags=["analyze"], route_class=DirectRoute)

# A voice needs this much audio around a keyword to be told from another.
LEAST_VOICE_S = 1.0
EXAMPLE = {
    "model": {"name": "sotto-edge", "version": 1},
    "duration_s": 1.0,
    "keywords": {
        "detections": [
            {"keyword": "en:computer", "score": 0.97, "start_s": 0.21, "end_s": 0.83, "spoken_by_speaker": True}
        ],
        "top": [{"keyword": "en:computer", "score": 0.97}],
    },
    "speaker": {
        "embedding": [0.021, -0.113, 0.054],
        "speech_s": 0.7,
        "snr_db": 24.0,
        "verification": {
            "speaker_id": "ada",
            "accepted": True,
            "score": 4.1,
            "probability": 0.98,
            "threshold": 0.0,
            "cosine": 0.71,
        },
    },
    "embedding": {"dim": 512, "embedding": [0.021, -0.113, 0.054]},
}


@router.post(
    "",
    summary="Keywords, speaker and embedding in one pass",
    response_model=AnalyzeAnswer,
    response_model_exclude_none=True,
    responses={
        200: {"content": {"application/json": {"example": EXAMPLE}}},
        **problems(*CLAIM_ERRORS),
    },
    openapi_extra=audio_body(several=False),
)
async def analyze(
    request: Request,
    caller: Infers,
    tasks: Annotated[list[Task], Query(description="Repeat for several; default: all that the model can do.")] = [],  # noqa: B006  FastAPI copies defaults
    speaker_id: Annotated[
        str | None, Query(max_length=128, description="Also says who spoke: the claim, and each detection.")
    ] = None,
    keywords: KeywordsParameter = [],  # noqa: B006  FastAPI copies defaults
    threshold: ThresholdParameter = None,
    top_k: TopParameter = 5,
    false_accept_rate: FalseAcceptRateParameter = None,
    model: ModelParameter = None,
) -> Response:
    """Each part as its own route would answer; with `speaker_id`, each detection says who spoke it."""
    runtime, clock = runtime_of(request), clock_of(request)
    deadline = deadline_of(request, runtime.settings)
    engine = await runtime.engine_for(model, deadline, *tasks)
    if speaker_id is not None:
        engine.require("speaker")
    elif false_accept_rate is not None:
        raise InvalidRequestError("false_accept_rate is about a claim: it needs speaker_id")
    tasks = tasks or list(tasks_of(engine.manifest))
    allowed = allowed_labels(engine, keywords)
    if speaker_id is not None and not {"keywords", "speaker"} & set(tasks):
        raise InvalidRequestError("speaker_id needs the task `keywords` or `speaker`")
    profile, threshold_of_claim = None, 0.0
    if speaker_id is not None:
        threshold_of_claim = engine.accepts_from(false_accept_rate)
        await runtime.own_space(engine, deadline)
        profile = await ready_profile(runtime, engine, caller.tenant, speaker_id, deadline)
    (clip,) = await runtime.uploads.receive(request, clock, deadline, at_most=1)
    waveform = await runtime.decode(engine, clip, clock, deadline)
    quality = measure(waveform)
    if "speaker" in tasks and quality.speech_s == 0:
        raise NoSpeechError("the clip holds silence or steady noise only; it has no speaker")
    outputs = await runtime.infer(engine, waveform, clock, deadline, _part(tasks))
    body = AnalyzeAnswer(model=model_info(engine), duration_s=waveform.duration_s)
    parts: dict[str, object] = {}
    if "keywords" in tasks:
        with clock.stage("postprocess"):
            detections, top = spot(engine, outputs, waveform.duration_s, allowed, threshold, top_k)
            for detection in detections:
                runtime.metrics.detections.labels(detection.keyword).inc()
        if profile is not None:
            detections = await _with_speaker(
                runtime, engine, profile, threshold_of_claim, waveform, detections, clock, deadline
            )
        parts["keywords"] = KeywordsPart(detections=detections, top=top)
    if "speaker" in tasks:
        parts["speaker"] = AnalyzedSpeaker(
            embedding=outputs.speaker_embedding.tolist(),
            speech_s=round(quality.speech_s, 3),
            snr_db=round(quality.snr_db, 1),
            verification=None if profile is None else decide(runtime, engine, profile, outputs, threshold_of_claim),
        )
    if "embedding" in tasks:
        parts["embedding"] = AnalyzedEmbedding(dim=engine.manifest.embedding.dim, embedding=outputs.embedding.tolist())
    return Response(body.model_copy(update=parts).model_dump_json(exclude_none=True), media_type="application/json")


def _part(tasks: list[Task]) -> Part:
    """What of the graph these tasks need."""
    wanted = set(tasks)
    return "keywords" if wanted == {"keywords"} else "speaker" if wanted == {"speaker"} else "all"


async def _with_speaker(
    runtime: Runtime,
    engine: Engine,
    profile: Profile,
    threshold: float,
    waveform: Waveform,
    detections: list[DetectionInfo],
    clock: StageClock,
    deadline: float,
) -> list[DetectionInfo]:
    """Mark each detection by whether the speaker's voice is in the stretch around it: in a long clip
    several people may speak, so the clip's own embedding does not tell."""
    marked = []
    for detection in detections:
        stretch = _around(waveform, detection.start_s, detection.end_s)
        outputs = await runtime.infer(engine, stretch, clock, deadline, "speaker")
        claimed = score_against(engine, profile, outputs)
        own = claimed.llr >= threshold
        marked.append(detection.model_copy(update={"spoken_by_speaker": own}))
    return marked


def _around(waveform: Waveform, start_s: float, end_s: float) -> Waveform:
    """The detection widened to LEAST_VOICE_S, as far as the clip reaches."""
    widen_s = max(0.0, LEAST_VOICE_S - (end_s - start_s)) / 2
    first = max(0, int((start_s - widen_s) * SAMPLE_RATE_HZ))
    last = min(len(waveform.samples), max(first + 1, int((end_s + widen_s) * SAMPLE_RATE_HZ)))
    return Waveform(waveform.samples[first:last])
