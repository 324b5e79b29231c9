"""Several models at once, and an alias that moves while requests come in."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from model_store import LocalStore
from service.app import create_app
from service.auth import hash_key
from service.engine import Engine
from service.settings import ApiKey, Settings
from tests.conftest import LOCAL, encoded, start_service, stop_service, voice

NAME = "sotto-edge"
DETECT, ALIAS = "/v1/keywords/detect", f"/v1/models/{NAME}/aliases/production"
WAV = {"Content-Type": "audio/wav"}
CLIP = encoded(voice(1.0))
VERSIONS = 3


@pytest.fixture
def store(tmp_path: Path, builtin_store: LocalStore) -> LocalStore:
    """The built-in model three times, each with speakers of its own; `production` is the first."""
    made = LocalStore(tmp_path / "models")
    bundle = builtin_store.resolve(NAME)
    assert bundle.manifest.speaker is not None
    speaker = bundle.manifest.speaker.model_copy(update={"space": None})
    manifest = bundle.manifest.model_copy(update={"speaker": speaker})
    for _ in range(VERSIONS):
        made.publish(manifest, {name: bundle.read(name) for name in manifest.files})
    made.set_alias(NAME, "production", 1)
    return made


def settings(store: LocalStore, **changes: object) -> Settings:
    given = {"data_dir": store.root.parent / "data", "models_dir": store.root, "inference_threads": 1, **changes}
    return Settings.model_validate(given)


@pytest.fixture
def client(store: LocalStore) -> Iterator[TestClient]:
    with TestClient(create_app(settings(store)), LOCAL) as made:
        yield made


def version(client: TestClient, **query: str) -> int:
    """Of the model that answers."""
    response = client.post(DETECT, params=query, content=CLIP, headers=WAV)
    assert response.status_code == 200, response.text
    return int(response.json()["model"]["version"])


def loaded(client: TestClient) -> list[int]:
    return [one["version"] for one in client.get(f"/v1/models/{NAME}").json()["versions"] if one["loaded"]]


def spoil(store: LocalStore, number: int) -> None:
    path = store.root / NAME / str(number) / "model.onnx"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def test_requests_follow_an_alias_that_moves(client: TestClient) -> None:
    assert version(client) == 1
    moved = client.post(ALIAS, json={"version": 2})
    assert moved.json() == {
        "name": NAME,
        "alias": "production",
        "version": 2,
        "default": {"name": NAME, "version": 2},
    }
    assert version(client) == 2
    assert loaded(client) == [2]
    assert 'version="2"' in client.get("/metrics").text


def test_another_alias_does_not_move_what_serves(client: TestClient) -> None:
    moved = client.post(f"/v1/models/{NAME}/aliases/canary", json={"version": 3})
    assert (moved.status_code, moved.json()["default"]["version"]) == (200, 1)
    assert version(client) == 1
    assert version(client, model=f"{NAME}@canary") == 3


def test_a_version_that_does_not_pass_its_checks_changes_nothing(client: TestClient, store: LocalStore) -> None:
    spoil(store, 2)
    refused = client.post(ALIAS, json={"version": 2})
    assert (refused.status_code, refused.json()["code"]) == (409, "model_unusable")
    assert store.aliases(NAME) == {"production": 1}
    assert version(client) == 1
    asked = client.post(DETECT, params={"model": f"{NAME}@2"}, content=CLIP, headers=WAV)
    assert (asked.status_code, asked.json()["code"]) == (409, "model_unusable")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (ALIAS, {"version": 9}, 404),
        ("/v1/models/nobody/aliases/production", {"version": 1}, 404),
        (ALIAS, {"version": 0}, 422),
        (ALIAS, {"version": 1, "force": True}, 422),
        (f"/v1/models/{NAME}/aliases/3", {"version": 1}, 422),
    ],
)
def test_a_move_that_makes_no_sense_is_refused(client: TestClient, path: str, body: object, status: int) -> None:
    assert client.post(path, json=body).status_code == status


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 3000, b'{"version": ' + b"1" * 3000 + b"}"])
def test_a_move_that_is_no_json_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post(ALIAS, content=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_a_move_of_many_bytes_is_refused(client: TestClient) -> None:
    answer = client.post(ALIAS, content=b" " * 5000)
    assert (answer.status_code, answer.json()["code"]) == (413, "audio_too_large")


def test_only_administrators_move_aliases(store: LocalStore) -> None:
    key = ApiKey(name="app", sha256=hash_key("secret"))
    with TestClient(create_app(settings(store, api_keys=(key,))), LOCAL) as client:
        refused = client.post(ALIAS, json={"version": 2}, headers={"X-API-Key": "secret"})
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert store.aliases(NAME) == {"production": 1}


def test_models_beyond_the_limit_are_unloaded_least_recently_used_first(store: LocalStore) -> None:
    one = Engine(store.resolve(NAME), intra_op_threads=1).memory_bytes
    with TestClient(create_app(settings(store, models_memory_bytes=one * 2 + one // 2)), LOCAL) as client:
        assert [version(client, model=f"{NAME}@{number}") for number in (2, 3)] == [2, 3]
        # The default stays, however long ago it was asked for.
        assert loaded(client) == [1, 3]


def test_where_requests_load_nothing_an_alias_still_does(store: LocalStore) -> None:
    with TestClient(create_app(settings(store, load_on_request=False)), LOCAL) as client:
        asked = client.post(DETECT, params={"model": f"{NAME}@2"}, content=CLIP, headers=WAV)
        assert (asked.status_code, asked.json()["code"]) == (404, "not_found")
        assert client.post(ALIAS, json={"version": 2}).status_code == 200
        assert version(client, model=f"{NAME}@2") == 2


def test_an_alias_moved_by_someone_else_is_followed(store: LocalStore) -> None:
    with TestClient(create_app(settings(store, models_refresh_s=0.01)), LOCAL) as client:
        assert version(client) == 1
        store.set_alias(NAME, "production", 3)
        end = time.monotonic() + 60
        while version(client) != 3:
            assert time.monotonic() < end, "the alias was not followed"


def test_a_broken_version_behind_the_alias_leaves_the_old_one_in_place(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(store, 2)
    with TestClient(create_app(settings(store, models_refresh_s=0.01)), LOCAL) as client:
        store.set_alias(NAME, "production", 2)
        end = time.monotonic() + 60
        while "is not served" not in caplog.text:
            assert time.monotonic() < end, "nobody looked"
            assert version(client) == 1
        assert version(client) == 1


def test_no_request_is_lost_while_the_alias_moves(store: LocalStore, tmp_path: Path) -> None:
    service = start_service(tmp_path / "work", models_dir=str(store.root))
    answers: Counter[tuple[int, int]] = Counter()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            response = service.post(DETECT, CLIP)
            answers[response.status_code, response.json().get("model", {}).get("version")] += 1

    try:
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            for number in (2, 3, 1, 2):
                moved = service.post(ALIAS, json={"version": number})
                assert moved.status_code == 200, moved.text
                # From here on nothing else answers.
                assert service.post(DETECT, CLIP).json()["model"]["version"] == number
            done.set()
            for one in asking:
                one.result()
    finally:
        done.set()
        stop_service(service)
    assert {status for status, _ in answers} == {200}
    assert {number for _, number in answers} == {1, 2, 3}


def test_versions_of_one_space_share_their_profiles(client: TestClient, store: LocalStore) -> None:
    bundle = store.resolve(NAME)
    assert bundle.manifest.speaker is not None
    speaker = bundle.manifest.speaker.model_copy(update={"space": f"{NAME}@1"})
    manifest = bundle.manifest.model_copy(update={"speaker": speaker})
    store.publish(manifest, {name: bundle.read(name) for name in manifest.files})
    voiced = encoded(voice(4.0))

    def post(what: str, number: int) -> dict[str, Any]:
        path = f"/v1/speakers/{what}"
        response = client.post(path, params={"model": f"{NAME}@{number}"}, content=voiced, headers=WAV)
        return {"status": response.status_code, **response.json()}

    assert [post("ada/enrollments", number)["enrollments"] for number in (1, 4)] == [1, 2]
    first, second = (post("ada/verify", number) for number in (1, 4))
    assert (first["status"], second["status"], second["model"]["version"]) == (200, 200, 4)
    assert second["score"] == pytest.approx(first["score"], abs=1e-3)
    assert post("identify", 4)["candidates"][0]["score"] == second["score"]
    spaces = {one["version"]: one["speaker_space"] for one in client.get(f"/v1/models/{NAME}").json()["versions"]}
    assert spaces == {number: f"{NAME}@{1 if number == 4 else number}" for number in (1, 2, 3, 4)}
    assert client.get("/v1/speakers/ada").json()["models"] == [{"name": NAME, "version": 1}]
    strange = post("ada/verify", 2)
    assert (strange["status"], strange["code"]) == (409, "model_mismatch")
    assert f"one of {NAME}@1" in strange["detail"]
    assert post("identify", 2)["skipped"] == 1
