"""The OpenAPI document is complete and says what the service does."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from service.app import create_app
from service.errors import PROBLEM_JSON, Problem, ServiceError
from service.routes import analyze, embeddings, identify, keywords, models, ops, speakers
from service.settings import Settings
from tests.conftest import RunningService

MODULES = (analyze, embeddings, identify, keywords, models, ops, speakers)
OPERATIONS = {
    ("post", "/v1/keywords/detect"),
    ("get", "/v1/keywords"),
    ("post", "/v1/speakers/{speaker_id}/enrollments"),
    ("post", "/v1/speakers/{speaker_id}/verify"),
    ("post", "/v1/speakers/identify"),
    ("get", "/v1/speakers"),
    ("get", "/v1/speakers/{speaker_id}"),
    ("delete", "/v1/speakers/{speaker_id}"),
    ("post", "/v1/embeddings"),
    ("post", "/v1/analyze"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("post", "/v1/models/{name}/aliases/{alias}"),
    ("get", "/healthz"),
    ("get", "/readyz"),
    ("get", "/metrics"),
}
# What any request can be refused with, any behind a key, any that takes audio.
REQUEST_STATUSES = {"400", "408", "422", "431", "500", "503"}
CALLER_STATUSES = REQUEST_STATUSES | {"401", "403", "429"}
AUDIO_STATUSES = CALLER_STATUSES | {"404", "409", "413", "415", "504"}
PROFILE_STATUSES = CALLER_STATUSES | {"504"}
ERROR_STATUSES = {
    ("post", "/v1/keywords/detect"): AUDIO_STATUSES,
    ("get", "/v1/keywords"): CALLER_STATUSES | {"404", "409", "504"},
    ("post", "/v1/speakers/{speaker_id}/enrollments"): AUDIO_STATUSES,
    ("post", "/v1/speakers/{speaker_id}/verify"): AUDIO_STATUSES,
    ("post", "/v1/speakers/identify"): AUDIO_STATUSES,
    ("get", "/v1/speakers"): PROFILE_STATUSES,
    ("get", "/v1/speakers/{speaker_id}"): PROFILE_STATUSES | {"404"},
    ("delete", "/v1/speakers/{speaker_id}"): PROFILE_STATUSES | {"404"},
    ("post", "/v1/embeddings"): AUDIO_STATUSES,
    ("post", "/v1/analyze"): AUDIO_STATUSES,
    ("get", "/v1/models"): CALLER_STATUSES | {"504"},
    ("get", "/v1/models/{name}"): CALLER_STATUSES | {"404", "504"},
    ("post", "/v1/models/{name}/aliases/{alias}"): CALLER_STATUSES | {"404", "409", "413", "504"},
    ("get", "/healthz"): REQUEST_STATUSES,
    ("get", "/readyz"): REQUEST_STATUSES,
    ("get", "/metrics"): REQUEST_STATUSES,
}
PROBES = {("get", "/healthz"), ("get", "/readyz"), ("get", "/metrics")}
AUDIO_CODES = (
    "undecodable_audio", "malformed_body", "audio_too_large", "unsupported_media_type", "audio_too_short",
    "invalid_samples", "invalid_request", "not_found", "unauthenticated", "forbidden", "overloaded", "rate_limited",
    "deadline_exceeded",
)  # fmt: skip


@pytest.fixture(scope="module")
def application() -> FastAPI:
    return create_app(Settings(api_keys=(), host="127.0.0.1"))


@pytest.fixture(scope="module")
def document(application: FastAPI) -> dict[str, Any]:
    return application.openapi()


@pytest.fixture(params=sorted(OPERATIONS), ids=" ".join)
def operation(request: pytest.FixtureRequest, document: dict[str, Any]) -> dict[str, Any]:
    """Each operation of the contract in turn."""
    method, path = request.param
    found: dict[str, Any] = document["paths"][path][method]
    return found


def test_the_routes_are_those_of_the_contract(document: dict[str, Any]) -> None:
    found = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert found == OPERATIONS


def test_the_document_is_the_one_that_is_served(service: RunningService, document: dict[str, Any]) -> None:
    assert service.get("/openapi.json").json() == document


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documentation_pages_need_nothing_from_elsewhere(service: RunningService, path: str) -> None:
    page = service.get(path)
    assert page.status_code == 200
    assert "http" not in page.headers["content-security-policy"]
    used = re.findall(r"""(?:src|href|spec-url|url)(?:=|: )["']([^"']+)""", page.text)
    assert {"openapi.json", "docs/favicon.png"} < set(used)
    assert [service.get(f"/{each}").status_code for each in used] == [200] * len(used)


def test_the_documentation_page_has_no_other_parts(service: RunningService) -> None:
    answer = service.get("/docs/core.py")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_every_route_has_words(operation: dict[str, Any]) -> None:
    assert 10 < len(operation["summary"]) < 80
    assert operation["description"]


def test_every_success_has_an_example(operation: dict[str, Any]) -> None:
    (success,) = [status for status in operation["responses"] if status.startswith("2")]
    answer = operation["responses"][success]
    if success == "204":
        assert "content" not in answer
    else:
        assert all("example" in content for content in answer["content"].values())


@pytest.mark.parametrize(("method", "path"), sorted(ERROR_STATUSES))
def test_every_error_is_documented_as_a_problem(document: dict[str, Any], method: str, path: str) -> None:
    answers = document["paths"][path][method]["responses"]
    errors = {status: answer for status, answer in answers.items() if not status.startswith("2")}
    assert set(errors) == ERROR_STATUSES[method, path]
    for status, answer in errors.items():
        if (method, path) in PROBES and status == "503":
            continue  # says what is wrong
        assert answer["content"] == {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}


@pytest.mark.parametrize(("method", "path"), sorted(ERROR_STATUSES))
def test_what_asks_for_a_key_says_so(document: dict[str, Any], method: str, path: str) -> None:
    ways = document["paths"][path][method].get("security")
    assert ways == (None if (method, path) in PROBES else [{}, {"bearer": []}, {"x-api-key": []}])
    assert {"bearer", "x-api-key"} == set(document["components"]["securitySchemes"])


def test_with_keys_nobody_goes_without() -> None:
    key = {"name": "app", "tenant": "app", "scopes": ["infer"], "sha256": "0" * 64}
    document = create_app(Settings(api_keys=[key], host="127.0.0.1")).openapi()
    assert document["paths"]["/v1/embeddings"]["post"]["security"] == [{"bearer": []}, {"x-api-key": []}]


def test_every_answer_has_the_headers_that_are_documented(service: RunningService, document: dict[str, Any]) -> None:
    answers = document["paths"]["/v1/keywords/detect"]["post"]["responses"]
    names = document["components"]["headers"]
    for answer, status in ((service.get("/v1/models"), "200"), (service.post("/v1/keywords/detect"), "415")):
        assert answer.status_code == int(status)
        for name in answers[status]["headers"]:
            assert name in answer.headers
            assert name in names
    assert "Retry-After" in answers["429"]["headers"]
    assert "WWW-Authenticate" in answers["401"]["headers"]


def test_deadlines_are_documented_where_they_are_kept(document: dict[str, Any]) -> None:
    for methods in document["paths"].values():
        for operation in methods.values():
            named = {"$ref": "#/components/parameters/timeout"} in operation["parameters"]
            assert named == ("504" in operation["responses"])


def test_generated_clients_get_names_that_can_be_read(document: dict[str, Any]) -> None:
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(set(names)) == len(names)
    assert {"detect", "enrol", "verify", "identify", "embed"} <= set(names)


@pytest.mark.parametrize("code", AUDIO_CODES)
def test_every_code_of_an_audio_route_is_named(document: dict[str, Any], code: str) -> None:
    answers = document["paths"]["/v1/keywords/detect"]["post"]["responses"].values()
    assert any(f"`{code}`" in answer["description"] for answer in answers)


def test_the_problem_schema_is_there(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["Problem"]
    assert set(schema["required"]) == {"type", "title", "status", "detail", "instance", "code"}
    Problem.model_validate(schema["example"])


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    def references(node: Any) -> set[str]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        own = {node["$ref"]} if isinstance(node, dict) and "$ref" in node else set()
        return own.union(*map(references, children))

    for name in references(document):
        _, components, kind, part = name.split("/")
        assert components == "components"
        assert part in document["components"][kind]


def test_every_audio_route_names_its_media_types(document: dict[str, Any]) -> None:
    for method, path in OPERATIONS:
        if method == "post" and "/aliases/" not in path:
            body = document["paths"][path]["post"]["requestBody"]["content"]
            wanted = {
                "audio/wav",
                "audio/flac",
                "audio/ogg",
                "audio/mpeg",
                "audio/pcm;rate=16000",
                "multipart/form-data",
            }
            assert set(body) == wanted


def modelled_routes() -> list[APIRoute]:
    routes = [route for module in MODULES for route in module.router.routes if isinstance(route, APIRoute)]
    return [route for route in routes if route.response_model is not None]


@pytest.mark.parametrize("route", modelled_routes(), ids=lambda route: route.path)
def test_examples_are_answers_that_the_route_could_give(route: APIRoute) -> None:
    example = route.responses[200]["content"]["application/json"]["example"]
    model = route.response_model
    assert issubclass(model, BaseModel)
    shown = model.model_validate(example).model_dump(mode="json", exclude_none=True)
    assert same_keys(example, shown), "an example's field that the model does not know"


def same_keys(example: Any, shown: Any) -> bool:
    """Whether every field of the example is one of the model's."""
    if isinstance(example, dict):
        known = {name: value for name, value in example.items() if value is not None}
        return known.keys() <= shown.keys() and all(same_keys(value, shown[name]) for name, value in known.items())
    if isinstance(example, list):
        return all(map(same_keys, example, shown))
    return True


def test_error_codes_are_distinct() -> None:
    codes = [leaf.code for leaf in ServiceError.__subclasses__()]
    assert len(set(codes)) == len(codes) >= 17
