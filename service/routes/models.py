"""What the store holds, what is loaded, and which version an alias means."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from pydantic import ValidationError

from model_store import BundleError, StoreError
from model_store.reference import ALIAS_PATTERN
from service.deadlines import within
from service.engine import tasks_of
from service.errors import (
    AudioTooLargeError,
    DeadlineExceededError,
    InvalidRequestError,
    MalformedBodyError,
    ModelUnusableError,
    NotFoundError,
    faults_of,
)
from service.intake import deadline_of, read_body
from service.routes.common import Administers, Infers, answer, model_info, problems, runtime_of
from service.runtime import Runtime
from service.schemas import AliasAnswer, AliasMove, ModelAnswer, ModelsAnswer, ModelVersion, OperatingPointEntry

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/models", tags=["models"])

LONGEST_MOVE_BYTES = 4096
MOVE_SCHEMA = AliasMove.model_json_schema()

MODEL_EXAMPLE = {
    "name": "sotto-edge",
    "aliases": {"production": 1},
    "versions": [
        {
            "version": 1,
            "digest": "5f1c…",
            "loaded": True,
            "created_at": "2026-11-20T12:00:00Z",
            "licence": "Apache-2.0",
            "parameters": 1798673,
            "keywords": 112,
            "tasks": ["keywords", "speaker", "embedding"],
            "speaker_space": "sotto-edge@1",
            "operating_points": [{"false_accept_rate": 0.01, "threshold": 2.3}],
            "metrics": [],
        }
    ],
}


@router.get(
    "",
    summary="List models",
    response_model=ModelsAnswer,
    responses={
        200: {
            "content": {
                "application/json": {
                    "example": {"default": {"name": "sotto-edge", "version": 1}, "models": [MODEL_EXAMPLE]}
                }
            }
        },
        **problems(DeadlineExceededError),
    },
)
async def list_models(request: Request, caller: Infers) -> Response:  # noqa: ARG001  asks for the scope
    """Every model of the store, with versions and aliases."""
    runtime = runtime_of(request)

    def described() -> list[ModelAnswer]:
        return [_describe(runtime, name) for name in runtime.store.names()]

    models = await within(runtime.models.threads, described, deadline_of(request, runtime.settings))
    return answer(ModelsAnswer(default=model_info(runtime.engine), models=models))


@router.get(
    "/{name}",
    summary="Show a model",
    response_model=ModelAnswer,
    responses={
        200: {"content": {"application/json": {"example": MODEL_EXAMPLE}}},
        **problems(NotFoundError, DeadlineExceededError),
    },
)
async def show_model(request: Request, caller: Infers, name: str) -> Response:  # noqa: ARG001  asks for the scope
    """Versions, aliases, digests, what was measured, and what is loaded."""
    runtime = runtime_of(request)

    def described() -> ModelAnswer:
        if name not in runtime.store.names():
            raise NotFoundError(f"no model {name[:80]!r}")
        return _describe(runtime, name)

    return answer(await within(runtime.models.threads, described, deadline_of(request, runtime.settings)))


@router.post(
    "/{name}/aliases/{alias}",
    summary="Point an alias at a version",
    response_model=AliasAnswer,
    responses={
        200: {
            "content": {
                "application/json": {
                    "example": {
                        "name": "sotto-edge",
                        "alias": "production",
                        "version": 4,
                        "default": {"name": "sotto-edge", "version": 4},
                    }
                }
            }
        },
        **problems(
            NotFoundError,
            ModelUnusableError,
            MalformedBodyError,
            AudioTooLargeError,
            DeadlineExceededError,
        ),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": MOVE_SCHEMA}}}},
)
async def move_alias(
    request: Request,
    caller: Administers,
    name: Annotated[str, Path(max_length=100)],
    alias: Annotated[str, Path(pattern=ALIAS_PATTERN)],
) -> Response:
    """The version is loaded and warmed beside what serves; then requests change over between two of them. A version
    that does not load changes nothing."""
    runtime = runtime_of(request)
    # Read here: FastAPI would take in a body of any size before it asks who calls.
    try:
        move = AliasMove.model_validate_json(
            await read_body(request, LONGEST_MOVE_BYTES, deadline_of(request, runtime.settings))
        )
    except ValidationError as error:
        raise InvalidRequestError(faults_of(error.errors())) from error
    await runtime.models.move_alias(name, alias, move.version)
    log.info("%s moved %s@%s to version %d", caller.name, name, alias, move.version)
    return answer(AliasAnswer(name=name, alias=alias, version=move.version, default=model_info(runtime.engine)))


def _describe(runtime: Runtime, name: str) -> ModelAnswer:
    versions = []
    for version in runtime.store.versions(name):
        try:
            bundle = runtime.store.resolve(f"{name}@{version}")
        except BundleError:
            # A broken version must not hide the sound ones; `sotto models verify` says what is wrong.
            continue
        manifest = bundle.manifest
        versions.append(
            ModelVersion(
                version=version,
                digest=bundle.digest,
                loaded=runtime.models.is_loaded(bundle.digest),
                created_at=manifest.created_at,
                licence=manifest.licence,
                parameters=manifest.graph.parameters,
                keywords=len(manifest.keywords.labels),
                tasks=list(tasks_of(manifest)),
                speaker_space=None if manifest.speaker is None else manifest.speaker_space,
                operating_points=[]
                if manifest.speaker is None
                else [
                    OperatingPointEntry.model_validate(point.model_dump())
                    for point in manifest.speaker.operating_points
                ],
                metrics=[metric.model_dump() for metric in manifest.metrics],
            )
        )
    try:
        aliases = runtime.store.aliases(name)
    except StoreError:
        # Likewise a broken alias: the versions can still be named by number.
        aliases = {}
    return ModelAnswer(name=name, aliases=aliases, versions=versions)
