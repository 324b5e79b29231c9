"""Routes that are called without FastAPI's search for their arguments, where there is nothing to search."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class AudioRoute(APIRoute):
    """A request without a query has each parameter at its default: what is left is the path and who calls. With one,
    FastAPI's own handler takes it, and so it does where the path is wrong, to say so. Resolving arguments generally
    takes as long as decoding a clip; the OpenAPI document comes from the same declaration either way.
    """

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

        async def handle(request: Request) -> Response:
            if request.scope["query_string"]:
                return await general(request)
            values: dict[str, Any] = {request_name: request}
            for field in wanted.path_params:
                value, errors = field.validate(request.path_params.get(field.alias), {}, loc=("path", field.alias))
                if errors:
                    return await general(request)
                values[field.name] = value
            for name, call in dependencies.items():
                values[name] = await call(request)
            for field in wanted.query_params:
                values[field.name] = field.get_default()
            response: Response = await endpoint(**values)
            return response

        return handle
