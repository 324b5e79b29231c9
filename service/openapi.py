"""What the OpenAPI document says of every operation alike: keys, headers of requests and answers, problem details."""

from __future__ import annotations

from typing import Any

from service.errors import PROBLEM_JSON, Problem, UnauthenticatedError
from service.protocol import REQUEST_ID

BEARER, KEY_HEADER = "bearer", "x-api-key"
SCHEMES = {
    BEARER: {"type": "http", "scheme": "bearer", "description": "An API key made by `sotto keys new`."},
    KEY_HEADER: {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_TEXT, _WHOLE = {"type": "string"}, {"type": "integer", "minimum": 1}
REQUEST_HEADERS = {
    "request_id": {
        "name": REQUEST_ID,
        "in": "header",
        "description": "Yours, echoed in the answer; made here where it is absent.",
        "schema": _TEXT,
    },
    "timeout": {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "Milliseconds after which no answer is wanted; at most `SOTTO_REQUEST_TIMEOUT_S`, the default.",
        "schema": _WHOLE,
    },
}
RESPONSE_HEADERS = {
    REQUEST_ID: {"description": "The request's id.", "schema": _TEXT},
    "Server-Timing": {
        "description": "Milliseconds by stage: `receive`, `decode`, `queue`, `inference`, `postprocess`; or `total`.",
        "schema": _TEXT,
    },
    "Retry-After": {"description": "Seconds.", "schema": _WHOLE},
    "WWW-Authenticate": {"description": "`Bearer`.", "schema": _TEXT},
}
OF_ALL = (REQUEST_ID, "Server-Timing")
OF_STATUS = {"401": ("WWW-Authenticate",), "429": ("Retry-After",), "503": ("Retry-After",)}


def complete(document: dict[str, Any], *, keyed: bool) -> dict[str, Any]:
    """The document with what FastAPI cannot know, as middleware and the protocol see to it; `keyed` where API keys
    are configured. Changes and returns it."""
    parts = document["components"]
    # No route names it as its model: FastAPI would document it as application/json.
    parts["schemas"].setdefault("Problem", Problem.model_json_schema())
    parts["securitySchemes"] = SCHEMES
    parts["parameters"] = REQUEST_HEADERS
    parts["headers"] = RESPONSE_HEADERS
    for operation in (one for methods in document["paths"].values() for one in methods.values()):
        _complete_operation(operation, keyed)
    return document


def _complete_operation(operation: dict[str, Any], keyed: bool) -> None:
    answers = operation["responses"] = dict(sorted(operation["responses"].items()))
    # Whatever asks for a key can refuse one.
    if str(UnauthenticatedError.status) in answers:
        operation["security"] = [*([] if keyed else [{}]), *({scheme: []} for scheme in SCHEMES)]
    headers = ["request_id", *(["timeout"] if "504" in answers else [])]
    operation.setdefault("parameters", []).extend({"$ref": f"#/components/parameters/{name}"} for name in headers)
    for status, answer in answers.items():
        problem = PROBLEM_JSON in answer.get("content", {})
        names = (*OF_ALL, *(OF_STATUS.get(status, ()) if problem else ()))
        answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
