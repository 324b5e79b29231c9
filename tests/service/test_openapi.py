"""The OpenAPI document is complete and says what the service does."""

from __future__ import annotations

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
# What any route behind a key can answer, and any that takes audio.
CALLER_STATUSES = {"401", "403", "422", "429", "431"}
AUDIO_STATUSES = CALLER_STATUSES | {"400", "404", "408", "409", "413", "415", "500", "503", "504"}
PROFILE_STATUSES = CALLER_STATUSES | {"503", "504"}
ERROR_STATUSES = {
    ("post", "/v1/keywords/detect"): AUDIO_STATUSES,
    ("get", "/v1/keywords"): CALLER_STATUSES | {"404", "409", "503"},
    ("post", "/v1/speakers/{speaker_id}/enrollments"): AUDIO_STATUSES,
    ("post", "/v1/speakers/{speaker_id}/verify"): AUDIO_STATUSES,
    ("post", "/v1/speakers/identify"): AUDIO_STATUSES,
    ("get", "/v1/speakers"): PROFILE_STATUSES,
    ("get", "/v1/speakers/{speaker_id}"): PROFILE_STATUSES | {"404"},
    ("delete", "/v1/speakers/{speaker_id}"): PROFILE_STATUSES | {"404"},
    ("post", "/v1/embeddings"): AUDIO_STATUSES,
    ("post", "/v1/analyze"): AUDIO_STATUSES,
    ("get", "/v1/models"): CALLER_STATUSES,
    ("get", "/v1/models/{name}"): CALLER_STATUSES | {"404"},
    ("post", "/v1/models/{name}/aliases/{alias}"): CALLER_STATUSES | {"400", "404", "408", "409", "413", "504"},
}
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


def test_the_documentation_page_opens(service: RunningService) -> None:
    assert service.get("/docs").status_code == 200


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
    for answer in errors.values():
        assert answer["content"] == {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}


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

    prefix = "#/components/schemas/"
    assert {name.removeprefix(prefix) for name in references(document)} <= set(document["components"]["schemas"])


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
