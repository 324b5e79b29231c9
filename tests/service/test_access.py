"""Who may call, how often, and what happens when all call at once: 401, 403, 429 and 503 over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.auth import hash_key
from tests.conftest import RunningService, encoded, start_service, stop_service, voice
from tests.service.test_errors import ROUTES, SPEAKER, problem

RATE_PER_MINUTE = 40
SCOPES = {"both": ["infer", "enrol"], "infers": ["infer"], "enrols": ["enrol"], "greedy": ["infer"], "other": ["infer"]}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service with API keys; each key's secret is its name and `-secret`."""
    keys = [{"name": name, "sha256": hash_key(f"{name}-secret"), "scopes": scopes} for name, scopes in SCOPES.items()]
    keys[-1]["tenant"] = "elsewhere"
    work = tmp_path_factory.mktemp("guarded")
    running = start_service(work, api_keys=json.dumps(keys), rate_per_minute=str(RATE_PER_MINUTE))
    yield running
    stop_service(running)


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-secret"}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic Ym90aA=="},
                                     {"Authorization": "Bearer"}, {"X-API-Key": "both"}])  # fmt: skip
def test_without_a_right_key(guarded: RunningService, route: str, headers: dict[str, str]) -> None:
    response = guarded.post(route, encoded(voice(1.0)), headers=headers)
    problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


def test_nothing_is_read_of_whom_nobody_knows(guarded: RunningService) -> None:
    """The answer comes before the body, which never does."""
    asking = http.client.HTTPConnection(guarded.url.removeprefix("http://"), timeout=20)
    asking.putrequest("POST", "/v1/models/sotto-edge/aliases/production")
    asking.putheader("Content-Length", "400000000")
    asking.endheaders()
    assert asking.getresponse().status == 401
    asking.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "elsewhere.example"}, 403),
        ({"Host": "elsewhere.example", "Origin": "http://elsewhere.example"}, 403),
        ({"Host": "["}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:8000", "Origin": "http://[::1]:8000"}, 200),
        ({"Host": "127.0.0.1", "Origin": "http://127.0.0.1"}, 200),
    ],
)
def test_without_keys_pages_of_other_origins_may_do_nothing(
    service: RunningService, headers: dict[str, str], status: int
) -> None:
    form = {"audio": ("a.wav", encoded(voice(1.0)), "audio/wav")}
    assert httpx.post(service.url + ROUTES["detect"], files=form, headers=headers).status_code == status


def test_with_keys_any_page_may_ask(guarded: RunningService) -> None:
    headers = {**key("both"), "Origin": "https://elsewhere.example", "Host": "speech.example"}
    assert guarded.post(ROUTES["detect"], encoded(voice(1.0)), headers=headers).status_code == 200


def test_a_right_key_in_either_header(guarded: RunningService) -> None:
    for headers in (key("both"), {"X-API-Key": "both-secret"}):
        assert guarded.post(ROUTES["detect"], encoded(voice(1.0)), headers=headers).status_code == 200


def test_a_key_without_the_scope(guarded: RunningService) -> None:
    clip = encoded(voice(1.0))
    problem(guarded.post(ROUTES["enrol"], clip, headers=key("infers")), 403, "forbidden")
    for name in set(ROUTES) - {"enrol"}:
        problem(guarded.post(ROUTES[name], clip, headers=key("enrols")), 403, "forbidden")


def test_another_tenant_sees_nothing(guarded: RunningService) -> None:
    assert guarded.post(ROUTES["enrol"], encoded(voice(3)), headers=key("both")).status_code == 200
    assert guarded.get(f"/v1/speakers/{SPEAKER}", headers=key("both")).status_code == 200
    problem(guarded.get(f"/v1/speakers/{SPEAKER}", headers=key("other")), 404, "not_found")
    assert guarded.get("/v1/speakers", headers=key("other")).json()["speakers"] == []


def test_a_key_over_its_rate(guarded: RunningService) -> None:
    """A minute's worth at once, then what trickles in; other keys do not notice."""
    allowed = 0
    with httpx.Client(base_url=guarded.url, headers=key("greedy"), timeout=60) as client:
        while (answer := client.get("/v1/keywords")).status_code == 200 and allowed < 20 * RATE_PER_MINUTE:
            allowed += 1
    problem(answer, 429, "rate_limited")
    assert allowed >= RATE_PER_MINUTE
    assert 1 <= int(answer.headers["retry-after"]) <= 60 / RATE_PER_MINUTE + 1
    assert guarded.get("/v1/keywords", headers=key("infers")).status_code == 200


def test_a_full_queue(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread and room for one waiting clip: of eight at once some wait, and some are told when to return."""
    work = tmp_path_factory.mktemp("full")
    running = start_service(
        work, inference_threads="1", max_queued_audio_s="60", max_batch="1", request_timeout_s="120"
    )
    try:
        clip = (voice(60) * 32767).astype("<i2").tobytes()
        with ThreadPoolExecutor(8) as threads:
            posts = [threads.submit(running.post, ROUTES["detect"], clip, "audio/pcm;rate=16000") for _ in range(8)]
        answers = [post.result() for post in posts]
    finally:
        stop_service(running)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
