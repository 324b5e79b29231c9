"""What the log tells of requests, and what it does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service.auth import hash_key
from service.journal import CALLER, CODE, MOST_REFUSED_PER_S, Journal
from tests.conftest import RunningService, encoded, start_service, voice
from tests.service.threads import until


def asked(method: str, **state: str) -> dict[str, Any]:
    return {"method": method, "state": state}


def lines(service: RunningService) -> list[str]:
    return [line for line in service.log.read_text().splitlines() if "service.journal" in line]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "service.journal")
    return caplog


def test_who_changed_what_and_who_was_refused_is_in_the_log(tmp_path: Path, started: list[RunningService]) -> None:
    keys = [{"name": "desk", "sha256": hash_key("secret"), "scopes": ["infer", "enrol"]}]
    service = start_service(tmp_path, api_keys=json.dumps(keys))
    started.append(service)
    known = {"Authorization": "Bearer secret", "X-Request-ID": "try-1"}
    assert service.post("/v1/speakers/ada/enrollments", encoded(voice(6)), headers=known).is_success
    assert service.post("/v1/keywords/detect", encoded(voice(1.0)), headers=known).is_success
    assert service.get("/v1/models", headers=known).is_success
    assert service.post("/v1/keywords/detect", encoded(voice(1.0))).status_code == 401
    moved = service.post("/v1/models/sotto-edge/aliases/production", b"{}", headers=known)
    assert moved.status_code == 403
    with pytest.raises(InvalidStatus), connect(f"ws{service.url[4:]}/v1/keywords/stream"):
        pass
    until(lambda: len(lines(service)) == 3)
    enrolled, unknown, forbidden = lines(service)
    assert " INFO " in enrolled
    assert "POST /v1/speakers/{speaker_id}/enrollments 200 in " in enrolled
    assert enrolled.endswith("key desk, request try-1")
    assert " WARNING " in unknown
    assert "POST /v1/keywords/detect 401 unauthenticated in " in unknown
    assert "key none, request " in unknown
    assert "POST /v1/models/{name}/aliases/{alias} 403 forbidden in " in forbidden
    assert "key desk" in forbidden
    log = service.log.read_text()
    assert "secret" not in log
    assert "ada" not in log
    # uvicorn's, of a WebSocket that was refused in words.
    assert " ERROR " not in log


def test_every_request_where_an_operator_asks_for_them(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, access_log="true")
    started.append(service)
    assert service.post("/v1/keywords/detect", encoded(voice(1.0))).is_success
    until(lambda: any("POST /v1/keywords/detect 200 in " in line for line in lines(service)))
    assert any("GET /readyz 200 in " in line for line in lines(service))


@pytest.mark.parametrize(
    ("status", "code", "level"),
    [
        (500, "internal_error", logging.WARNING),
        (504, "deadline_exceeded", logging.WARNING),
        (503, "overloaded", None),
        (503, "storage_unavailable", None),
        (422, "audio_too_short", None),
        (200, "", None),
    ],
)
def test_failures_are_told_unless_there_are_as_many_as_requests(
    told: pytest.LogCaptureFixture, status: int, code: str, level: int | None
) -> None:
    scope = asked("POST", **{CALLER: "desk", CODE: code})
    Journal(everything=False).tell(scope, "/v1/keywords/detect", status, 0.5, "try-2")
    assert [record.levelno for record in told.records] == ([] if level is None else [level])


def test_whoever_guesses_keys_does_not_fill_the_disk(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("service.journal.time.monotonic", lambda: now)
    journal = Journal(everything=False)
    for _ in range(MOST_REFUSED_PER_S + 7):
        journal.tell(asked("GET"), "/v1/models", 401, 0.001, "x")
    assert len(told.records) == MOST_REFUSED_PER_S
    now = 101.0
    journal.tell(asked("GET"), "/v1/models", 401, 0.001, "x")
    assert told.records[MOST_REFUSED_PER_S].getMessage() == "7 more requests were refused (401 or 403)"
    assert len(told.records) == MOST_REFUSED_PER_S + 2
