"""For operators: alive, ready, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.routes.common import answer, problems, runtime_of
from service.schemas import HealthAnswer, ReadyAnswer

router = APIRouter(tags=["operations"])

READY_EXAMPLE = {
    "ready": True,
    "checks": {"accepting": True, "decoding": True, "inference": True, "profiles": True},
}


@router.head("/healthz", include_in_schema=False)
@router.get(
    "/healthz",
    summary="Is the process up?",
    response_model=HealthAnswer,
    responses={
        **problems(keyed=False),
        200: {"content": {"application/json": {"example": {"status": "ok"}}}},
        503: {"model": HealthAnswer, "description": "Threads are stuck in calls that never end: restart the process."},
    },
)
async def health(request: Request) -> Response:
    """Answers as long as the event loop turns."""
    stuck = runtime_of(request).beyond_repair
    return answer(HealthAnswer(status="stuck" if stuck else "ok"), status=503 if stuck else 200)


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Should requests be sent here?",
    response_model=ReadyAnswer,
    responses={
        **problems(keyed=False),
        200: {"content": {"application/json": {"example": READY_EXAMPLE}}},
        503: {"model": ReadyAnswer, "description": "Some check fails; `checks` says which."},
    },
)
async def ready(request: Request) -> Response:
    """Model loaded, workers alive, profile database answering (it is asked every two seconds), not shutting down."""
    runtime = runtime_of(request)
    checks = runtime.checks()
    good = runtime.is_ready(checks)
    return answer(ReadyAnswer(ready=good, checks=checks), status=200 if good else 503)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={**problems(keyed=False), 200: {"content": {"text/plain": {"example": "sotto_ready 1.0\n"}}}},
)
async def metrics(request: Request) -> Response:
    """Text format, or OpenMetrics where the scraper asks for it."""
    try:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
    # Of a version that is none.
    except (TypeError, ValueError):
        encode, content_type = choose_encoder("")
    return Response(encode(runtime_of(request).metrics.registry), media_type=content_type)
