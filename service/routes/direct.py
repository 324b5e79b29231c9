"""Routes that are called without FastAPI's search for their arguments, where there is nothing to search, and those of
a fixed path without routing and the framework's own layers either: together more work for the event loop than decoding
and ranking a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from copy import copy
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

# In a request's scope: what answers it.
_HANDLER = "sotto.handler"


class DirectRoute(APIRoute):
    """A request without a query has each parameter at its default: what is left is the path and who calls. With one,
    FastAPI's own handler takes it, and so it does where the path is wrong, to say so. The OpenAPI document comes from
    the same declaration either way.
    """

    # For requests without a query; None where FastAPI has to look for arguments all the same.
    direct: Handler | None = None

    def get_route_handler(self) -> Handler:
        general: Handler = super().get_route_handler()
        wanted = self.dependant
        endpoint = wanted.call
        others = (wanted.header_params, wanted.cookie_params, wanted.body_params)
        required = [field for field in wanted.query_params if field.field_info.is_required()]
        if endpoint is None or wanted.request_param_name is None or required or any(others):
            return general
        request_name = wanted.request_param_name
        # Those without a name only look at the query.
        dependencies = {one.name: one.call for one in wanted.dependencies if one.name and one.call}
        defaults = {field.name: field.get_default() for field in wanted.query_params}
        mutable = [name for name, value in defaults.items() if isinstance(value, list)]

        async def handle(request: Request) -> Response:
            if request.scope["query_string"]:
                return await general(request)
            values: dict[str, Any] = {**defaults, request_name: request}
            for name in mutable:
                values[name] = copy(defaults[name])
            for field in wanted.path_params:
                value, errors = field.validate(request.path_params.get(field.alias), {}, loc=("path", field.alias))
                if errors:
                    return await general(request)
                values[field.name] = value
            for name, call in dependencies.items():
                values[name] = await call(request)
            response: Response = await endpoint(**values)
            return response

        self.direct = handle
        return handle


class DirectRoutes:
    """ASGI: takes requests for `routes` that have a fixed path and no query, with `around` them what is around the
    others too, and leaves those to `app`."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[BaseRoute],
        around: Sequence[Middleware],
        on_error: Callable[[Request, ServiceError], Coroutine[Any, Any, Response]],
    ) -> None:
        self._app = app
        self._on_error = on_error
        self._routes = {
            (method, route.path): (route, route.direct)
            for route in routes
            if isinstance(route, DirectRoute) and route.direct is not None and not route.dependant.path_params
            for method in route.methods or ()
        }
        self._direct: ASGIApp = self._answer
        for layer, arguments, options in reversed(around):
            self._direct = layer(self._direct, *arguments, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = None
        if scope["type"] == "http" and not scope["query_string"]:
            found = self._routes.get((scope["method"], scope["path"]))
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["route"], scope[_HANDLER] = found
        await self._direct(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            response = await scope[_HANDLER](request)
        except ServiceError as error:
            response = await self._on_error(request, error)
        await response(scope, receive, send)
