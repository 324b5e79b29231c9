"""Every row of the contract's error table, on every audio route, over HTTP."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from service.errors import PROBLEM_JSON
from tests.conftest import RunningService, encoded, start_service, stop_service, voice

SPEAKER = "errors-ada"
ROUTES = {
    "detect": "/v1/keywords/detect",
    "enrol": f"/v1/speakers/{SPEAKER}/enrollments",
    "verify": f"/v1/speakers/{SPEAKER}/verify",
    "identify": "/v1/speakers/identify",
    "embeddings": "/v1/embeddings",
    "analyze": "/v1/analyze",
}
ONE_CLIP_ROUTES = ("detect", "verify", "identify", "analyze")
BOUNDARY = "sotto-test-boundary"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
MOST_UPLOAD_BYTES = 50_000
# A timer fires when the event loop gets to it; the machine may be busy.
TIMER_SLACK_MS = 50


@pytest.fixture(scope="module", autouse=True)
def _enrolled(service: RunningService) -> Iterator[None]:
    response = service.post(ROUTES["enrol"], encoded(voice(6)))
    assert response.json()["status"] == "enrolled", response.text
    yield
    assert httpx.delete(f"{service.url}/v1/speakers/{SPEAKER}").status_code == 204


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    """The path of each audio route in turn."""
    return ROUTES[request.param]


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body, once it is known to be this problem and complete."""
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM_JSON), response.text
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail", "instance", "code"}
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:sotto:problem:{code}")
    assert body["title"]
    assert body["detail"]
    assert body["instance"] == response.url.path
    return body


def form(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    body = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in parts
    )
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def silence(seconds: float, **options: Any) -> bytes:
    return encoded(np.zeros(int(seconds * options.get("rate_hz", 16_000)), dtype=np.float32), **options)


def spoilt() -> bytes:
    samples = voice(1.0)
    samples[777] = np.nan
    return encoded(samples, subtype="FLOAT")


BAD_AUDIO: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "empty": (lambda: b"", 400, "undecodable_audio"),
    "truncated": (lambda: encoded(voice(1.0), container="OGG", subtype="OPUS")[:600], 400, "undecodable_audio"),
    "random": (lambda: b"\x00" + np.random.default_rng(1).bytes(9000), 400, "undecodable_audio"),
    "one-hertz": (lambda: encoded(np.zeros(100, dtype=np.float32), rate_hz=1), 400, "undecodable_audio"),
    "too-long": (lambda: silence(121, rate_hz=8_000), 413, "audio_too_large"),
    "bomb": (lambda: silence(1800, container="FLAC"), 413, "audio_too_large"),
    "too-short": (lambda: encoded(voice(0.05)), 422, "audio_too_short"),
    "nan": (spoilt, 422, "invalid_samples"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio(service: RunningService, route: str, kind: str) -> None:
    make, status, code = BAD_AUDIO[kind]
    response = service.post(route, make())
    if (kind, route) == ("too-short", ROUTES["enrol"]):
        # Refused as a clip is that says too little.
        assert [clip["reason"] for clip in response.json()["clips"]] == ["too_short"]
    else:
        problem(response, status, code)


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio_in_a_form(service: RunningService, kind: str) -> None:
    make, status, code = BAD_AUDIO[kind]
    problem(service.post(ROUTES["detect"], files={"audio": ("a.wav", make(), "audio/wav")}), status, code)


def test_raw_samples_without_a_rate(service: RunningService, route: str) -> None:
    problem(service.post(route, bytes(32_000), "audio/pcm"), 400, "undecodable_audio")


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
def test_a_media_type_that_is_no_audio(service: RunningService, route: str, content_type: str) -> None:
    problem(service.post(route, encoded(voice(1.0)), content_type), 415, "unsupported_media_type")


def test_a_compressed_body(service: RunningService, route: str) -> None:
    response = service.post(route, encoded(voice(1.0)), headers={"Content-Encoding": "gzip"})
    problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("name", ["verify", "identify", "embeddings", "analyze"])
def test_silence_where_a_voice_is_needed(service: RunningService, name: str) -> None:
    problem(service.post(ROUTES[name], silence(1.0)), 422, "no_speech")


def test_silence_holds_no_keywords(service: RunningService) -> None:
    response = service.post(ROUTES["detect"], silence(1.0))
    assert (response.status_code, response.json()["detections"]) == (200, [])


def test_silence_is_refused_from_a_profile_without_harm(service: RunningService) -> None:
    before = service.get(f"/v1/speakers/{SPEAKER}").json()
    body = service.post(ROUTES["enrol"], silence(1.0)).json()
    assert [(clip["accepted"], clip["reason"]) for clip in body["clips"]] == [(False, "no_speech")]
    assert service.get(f"/v1/speakers/{SPEAKER}").json() == before


def test_high_rates_and_wrong_labels_are_fine(service: RunningService, route: str) -> None:
    speech = np.repeat(voice(2.0), 6)
    assert service.post(route, encoded(speech, rate_hz=96_000, container="FLAC"), "audio/mpeg").status_code == 200


def test_an_unknown_model(service: RunningService, route: str) -> None:
    for model in ("nobody", "sotto-edge@99", "sotto-edge@nowhere", "../../etc"):
        problem(service.post(route, encoded(voice(1.0)), params={"model": model}), 404, "not_found")


@pytest.mark.parametrize("name", ["detect", "analyze"])
def test_an_unknown_keyword(service: RunningService, name: str) -> None:
    params = {"keywords": ["en:computer", "xx:nothing"]}
    body = problem(service.post(ROUTES[name], encoded(voice(1.0)), params=params), 404, "not_found")
    assert "xx:nothing" in body["detail"]


def test_an_unknown_speaker(service: RunningService) -> None:
    clip = encoded(voice(1.0))
    problem(service.post("/v1/speakers/nobody/verify", clip), 404, "not_found")
    problem(service.post("/v1/analyze", clip, params={"speaker_id": "nobody"}), 404, "not_found")
    problem(service.get("/v1/speakers/nobody"), 404, "not_found")
    problem(httpx.delete(f"{service.url}/v1/speakers/nobody"), 404, "not_found")


@pytest.mark.parametrize("speaker_id", ["-x", "a%20b", "a" * 129, "%00", "a%0Ab"])
def test_a_speaker_id_of_another_form(service: RunningService, speaker_id: str) -> None:
    response = service.get(f"/v1/speakers/{speaker_id}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_an_unknown_query_parameter(service: RunningService, route: str) -> None:
    body = problem(service.post(route, encoded(voice(1.0)), params={"treshold": "0.5"}), 422, "invalid_request")
    assert "treshold" in body["detail"]


@pytest.mark.parametrize(
    ("name", "params"),
    [("detect", {"threshold": "2"}), ("detect", {"threshold": "nan"}), ("detect", {"top_k": "-1"}),
     ("embeddings", {"type": "music"}), ("embeddings", {"encoding": "hex"}), ("analyze", {"tasks": "everything"}),
     ("analyze", {"tasks": "embedding", "speaker_id": SPEAKER})],
)  # fmt: skip
def test_a_parameter_out_of_range(service: RunningService, name: str, params: dict[str, str]) -> None:
    problem(service.post(ROUTES[name], encoded(voice(1.0)), params=params), 422, "invalid_request")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "cursor=!!", "cursor=%FF"])
def test_a_page_that_cannot_be(service: RunningService, query: str) -> None:
    problem(service.get(f"/v1/speakers?{query}"), 422, "invalid_request")


def test_a_wrong_method(service: RunningService, route: str) -> None:
    response = httpx.put(service.url + route, content=b"")
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/nothing", "/v2/keywords", "/v1/keywords/", "//", "/v1/models/nobody"])
def test_an_unknown_route(service: RunningService, path: str) -> None:
    response = service.get(path)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "9999999999", "\u00b2".encode()])
def test_a_deadline_that_is_no_number(service: RunningService, route: str, value: str | bytes) -> None:
    response = service.post(route, encoded(voice(1.0)), headers={"X-Request-Timeout-Ms": value})
    problem(response, 422, "invalid_request")


def test_a_deadline_that_passes_on_the_way(service: RunningService, route: str) -> None:
    """Two minutes cannot be decoded in a millisecond."""
    response = service.post(route, encoded(voice(110)), headers={"X-Request-Timeout-Ms": "1"})
    if response.status_code == 503:
        problem(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
    else:
        problem(response, 504, "deadline_exceeded")


def test_a_deadline_that_passes_during_inference(service: RunningService) -> None:
    """Whatever the deadline, an answer of 200 came before it, by the service's own clock."""
    clip = (voice(110) * 32767).astype("<i2").tobytes()
    statuses = set()
    for timeout_ms in (30, 60, 90, 120):
        headers = {"X-Request-Timeout-Ms": str(timeout_ms)}
        response = service.post(ROUTES["detect"], clip, "audio/pcm;rate=16000", headers=headers)
        stages = re.findall(r"(?:decode|queue|inference);dur=([\d.]+)", response.headers.get("server-timing", ""))
        assert response.status_code in (503, 504) or sum(map(float, stages)) <= timeout_ms + TIMER_SLACK_MS
        statuses.add(response.status_code)
    assert statuses & {503, 504}


FORMS: dict[str, tuple[bytes, str]] = {
    "no-boundary": (form(("audio", b"x")), "multipart/form-data"),
    "empty-boundary": (form(("audio", b"x")), "multipart/form-data; boundary="),
    "other-boundary": (form(("audio", b"x")), "multipart/form-data; boundary=elsewhere"),
    "no-audio": (form(("file", b"x")), FORM_TYPE),
    "empty": (b"", FORM_TYPE),
    "no-parts": (form(), FORM_TYPE),
    "too-many-parts": (form(*[("field", b"x")] * 10_000), FORM_TYPE),
    "truncated": (form(("audio", encoded(voice(1.0))), end=False), FORM_TYPE),
    "headers-only": (f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="audio"'.encode(), FORM_TYPE),
    "long-header": (f"--{BOUNDARY}\r\nX-Long: {'x' * 100_000}\r\n\r\n".encode() + form(), FORM_TYPE),
}


@pytest.mark.parametrize("kind", FORMS)
def test_a_malformed_form(service: RunningService, route: str, kind: str) -> None:
    problem(service.post(route, *FORMS[kind]), 400, "malformed_body")


@pytest.mark.parametrize("name", ONE_CLIP_ROUTES)
def test_two_clips_where_one_is_taken(service: RunningService, name: str) -> None:
    clip = encoded(voice(1.0))
    problem(service.post(ROUTES[name], form(("audio", clip), ("audio", clip)), FORM_TYPE), 400, "malformed_body")


def test_one_bad_clip_keeps_the_whole_enrolment_out(service: RunningService) -> None:
    clips = form(("audio", encoded(voice(3))), ("audio", b"no audio"))
    problem(service.post("/v1/speakers/errors-half/enrollments", clips, FORM_TYPE), 400, "undecodable_audio")
    problem(service.get("/v1/speakers/errors-half"), 404, "not_found")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that takes small uploads."""
    running = start_service(tmp_path_factory.mktemp("narrow"), max_upload_bytes=str(MOST_UPLOAD_BYTES))
    yield running
    stop_service(running)


def test_too_many_bytes(narrow: RunningService, route: str) -> None:
    problem(narrow.post(route.replace("verify", "enrollments"), bytes(MOST_UPLOAD_BYTES + 1)), 413, "audio_too_large")


def test_too_many_bytes_of_unknown_number(narrow: RunningService) -> None:
    chunks = (bytes(1000) for _ in range(MOST_UPLOAD_BYTES // 1000 + 1))
    headers = {"Content-Type": "audio/wav"}
    problem(httpx.post(narrow.url + ROUTES["detect"], content=chunks, headers=headers), 413, "audio_too_large")


def test_an_upload_that_fits_exactly(narrow: RunningService) -> None:
    clip = (voice(MOST_UPLOAD_BYTES / 32_000) * 32767).astype("<i2").tobytes()
    assert len(clip) == MOST_UPLOAD_BYTES
    assert narrow.post(ROUTES["detect"], clip, "audio/pcm;rate=16000").status_code == 200


def test_a_flood_of_tiny_chunks_is_one_clip(narrow: RunningService) -> None:
    data = encoded(voice(1.0))
    chunks = (data[start : start + 6] for start in range(0, len(data), 6))
    response = httpx.post(
        narrow.url + ROUTES["detect"], content=chunks, headers={"Content-Type": "audio/wav"}, timeout=60
    )
    assert response.json()["duration_s"] == 1.0


def test_a_client_that_leaves_during_its_upload_harms_no_one(narrow: RunningService) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    unfinished = (
        "POST /v1/keywords/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\n"
        "Content-Length: 9999\r\n\r\nRIFF"
    )
    for _ in range(20):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(unfinished.encode())
    assert narrow.get("/readyz").status_code == 200
