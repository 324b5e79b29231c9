"""create_app(settings): builds every part, wires routes, owns the lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import (
    PROBLEM_JSON,
    PROBLEM_TYPE_PREFIX,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    faults_of,
    problem_response,
)
from service.intake import TIMEOUT_HEADER
from service.journal import CODE, Journal
from service.middleware import RequestFrame
from service.openapi import complete
from service.protocol import REQUEST_ID, own_request_id
from service.routes import analyze, console, docs, embeddings, identify, keywords, models, ops, speakers, stream
from service.routes.common import refuse_unknown_query, runtime_of
from service.routes.direct import DirectRoutes
from service.runtime import Runtime
from service.settings import Settings

DESCRIPTION = """Keywords, speaker verification and speech embeddings from one small network.

Send audio as the raw body (`audio/wav`, `audio/flac`, `audio/ogg`, `audio/mpeg`, `audio/pcm;rate=16000`) or as the
part `audio` of `multipart/form-data`. Errors are RFC 9457 problem details with a stable `code`. Live audio goes to the
WebSocket `/v1/keywords/stream`, which OpenAPI has no words for; the README has."""


MODULES = (keywords, stream, identify, speakers, embeddings, analyze, models, ops, console, docs)


class _Application(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        routes = [each for module in MODULES for each in module.router.routes]
        return DirectRoutes(stack, routes, self.user_middleware, _on_service_error)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = complete(super().openapi(), keyed=bool(self.state.runtime.settings.api_keys))
        return self.openapi_schema


# How long a browser need not ask again whether a page may use the service; more is more than browsers grant.
CORS_MAX_AGE_S = 7200
# The server has drained all requests by then; only a stuck call can make this wait.
CLOSE_S = 2.0


def create_app(settings: Settings) -> FastAPI:
    """The application; the model is loaded when its lifespan starts, or before by `state.runtime.start`."""
    runtime = Runtime(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not runtime.started:
            await asyncio.to_thread(runtime.start)
        watching = asyncio.create_task(runtime.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait((watching,))
            runtime.draining = True
            runtime.closed = await asyncio.to_thread(runtime.close, CLOSE_S)

    app = _Application(
        title="sotto",
        description=DESCRIPTION,
        version=version("sotto"),
        lifespan=lifespan,
        redirect_slashes=False,
        # Its traces hold paths, in which callers write who speaks; and to ask whether anybody wants them takes as long
        # as reading a head.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        # `routes/docs.py` has them without a CDN.
        docs_url=None,
        redoc_url=None,
        # What generated clients call their functions.
        generate_unique_id_function=lambda route: route.name,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        dependencies=[Depends(refuse_unknown_query)],
    )
    app.state.runtime = runtime
    for module in MODULES:
        app.include_router(module.router)
    # Within the frame, so that what browsers ask beforehand has an id and counts as well.
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type", REQUEST_ID, TIMEOUT_HEADER],
            expose_headers=[REQUEST_ID, "Server-Timing", "Retry-After"],
            max_age=CORS_MAX_AGE_S,
        )
    journal = Journal(everything=settings.access_log)
    app.add_middleware(RequestFrame, metrics=runtime.metrics, uploads=runtime.uploads, journal=journal)
    # Starlette's own answers a WebSocket with an empty 403.
    app.router.default = _no_route
    app.add_exception_handler(ServiceError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(WebSocketRequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


async def _on_error(request: HTTPConnection, error: Exception) -> Any:
    """The response. A WebSocket that was not accepted yet gets it too, as a plain HTTP response, sent here."""
    assert isinstance(error, ServiceError)
    response = await _on_service_error(request, error)
    if not isinstance(request, WebSocket):
        return response
    response.headers[REQUEST_ID] = own_request_id(request.headers.get(REQUEST_ID, ""))
    await request.send_denial_response(response)
    return None


async def _on_service_error(request: HTTPConnection, error: ServiceError) -> Response:
    runtime_of(request).metrics.rejects.labels(error.code).inc()
    request.scope.setdefault("state", {})[CODE] = error.code
    return problem_response(error, request.url.path)


async def _on_validation_error(request: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, RequestValidationError | WebSocketRequestValidationError)
    return await _on_error(request, InvalidRequestError(faults_of(error.errors())))


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  an ASGI application
    raise NotFoundError(f"no route {scope['path'][:200]}")


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in the one error shape."""
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    runtime_of(request).metrics.rejects.labels(code).inc()
    body: dict[str, Any] = {
        "type": PROBLEM_TYPE_PREFIX + code,
        "title": HTTPStatus(error.status_code).phrase,
        "status": error.status_code,
        "detail": str(error.detail),
        "instance": request.url.path,
        "code": code,
    }
    return JSONResponse(body, error.status_code, headers=error.headers, media_type=PROBLEM_JSON)
