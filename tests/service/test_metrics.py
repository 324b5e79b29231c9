"""What a Prometheus server sees: every series that operators need, and no more, whatever callers send."""

from __future__ import annotations

import random
import shutil
import string
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import REPOSITORY, RunningService, encoded, start_service, stop_service, voice

COMPUTER = (REPOSITORY / "examples" / "computer.wav").read_bytes()
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that has seen traffic of every kind."""
    running = start_service(tmp_path_factory.mktemp("busy"))
    traffic(running)
    yield running
    stop_service(running)


def traffic(service: RunningService) -> None:
    clip = encoded(voice(3))
    service.post("/v1/keywords/detect", COMPUTER)
    service.post("/v1/speakers/hopper-9/enrollments", clip)
    service.post("/v1/speakers/hopper-9/enrollments", encoded(voice(3, seed=1)))
    service.post("/v1/speakers/hopper-9/enrollments", encoded(voice(0.2)))
    service.post("/v1/speakers/hopper-9/verify", clip)
    service.post("/v1/speakers/hopper-9/verify", encoded(voice(3, pitch_hz=250)))
    service.post("/v1/embeddings", clip)
    service.post("/v1/analyze", clip, params={"speaker_id": "hopper-9"})
    service.get("/v1/speakers")
    service.get("/v1/models")
    service.get("/healthz")
    service.get("/metrics")
    surprises(service, random.Random(0))


def surprises(service: RunningService, rng: random.Random, count: int = 12) -> None:
    """What strangers send: other ids, paths, methods, keywords, models, headers and bodies each time."""
    with httpx.Client(base_url=service.url, timeout=60) as client, ThreadPoolExecutor(4) as threads:
        for calls in [strange_calls(rng) for _ in range(count)]:
            list(threads.map(lambda call: client.request(*call[:2], **call[2]), calls))


def strange_calls(rng: random.Random) -> list[tuple[str, str, dict[str, object]]]:
    word = "".join(rng.choices(string.ascii_lowercase, k=12))
    wav = {"content": encoded(voice(0.2)), "headers": {"Content-Type": "audio/wav", "X-Request-ID": word}}
    junk = {"content": word.encode(), "headers": {"Content-Type": f"audio/{word}", "User-Agent": word}}
    return [
        ("GET", f"/v1/speakers/{word}", {}),
        ("DELETE", f"/v1/speakers/{word}", {}),
        ("POST", f"/v1/speakers/{word}/verify", wav),
        ("GET", f"/{word}/{word}", {}),
        ("GET", f"/v1/models/{word}", {}),
        ("POST", "/v1/keywords/detect", {**wav, "params": {"keywords": word}}),
        ("POST", "/v1/keywords/detect", {**wav, "params": {"model": word}}),
        ("POST", "/v1/keywords/detect", {**wav, "params": {word: word}}),
        ("POST", "/v1/keywords/detect", junk),
        ("POST", "/v1/embeddings", {"content": b"x", "headers": {"Content-Type": f"{word}/{word}"}}),
        ("PROPFIND", f"/v1/speakers/{word}", {}),
        ("REPORT", f"/{word}", {}),
    ]


def families(service: RunningService) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(service.get("/metrics").text)}


def series(service: RunningService) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in families(service).values()
        for sample in family.samples
    }


def value(service: RunningService, name: str, /, **labels: str) -> float:
    """The sum over the series with these labels."""
    samples = [sample for family in families(service).values() for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_finds_no_fault(busy: RunningService) -> None:
    exposition = busy.get("/metrics").text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("sotto_request_duration_seconds", "histogram", {"route", "method", "status"}),
        ("sotto_stage_duration_seconds", "histogram", {"stage"}),
        ("sotto_batch_size", "histogram", set()),
        ("sotto_queue_depth", "gauge", set()),
        ("sotto_queued_audio_seconds", "gauge", set()),
        ("sotto_rejects", "counter", {"reason"}),
        ("sotto_audio_seconds", "counter", set()),
        ("sotto_detections", "counter", {"keyword"}),
        ("sotto_verifications", "counter", {"outcome"}),
        ("sotto_enrolment_clips", "counter", {"outcome"}),
        ("sotto_worker_failures", "counter", {"kind"}),
        ("sotto_ready", "gauge", set()),
        ("sotto_clips_a_call", "gauge", set()),
        ("sotto_inference_threads", "gauge", set()),
        ("sotto_model_info", "gauge", {"name", "version", "digest"}),
        ("process_resident_memory_bytes", "gauge", set()),
    ],
)
def test_the_series_that_operators_need(busy: RunningService, name: str, kind: str, labels: set[str]) -> None:
    family = families(busy)[name]
    assert family.type == kind
    assert {label for sample in family.samples for label in sample.labels} - {"le"} == labels
    assert family.documentation


def test_every_stage_is_timed(busy: RunningService) -> None:
    for stage in ("receive", "decode", "queue", "inference", "postprocess"):
        assert value(busy, "sotto_stage_duration_seconds_count", stage=stage) > 0


def test_requests_are_counted_by_route_and_status(busy: RunningService) -> None:
    labels = {"route": "/v1/keywords/detect", "method": "POST", "status": "200"}
    before = value(busy, "sotto_request_duration_seconds_count", **labels)
    for _ in range(3):
        busy.post("/v1/keywords/detect", COMPUTER)
    assert value(busy, "sotto_request_duration_seconds_count", **labels) == before + 3


def test_audio_detections_and_verifications_are_counted(busy: RunningService) -> None:
    names = ("sotto_audio_seconds_total", "sotto_detections_total", "sotto_verifications_total")
    before = [value(busy, name) for name in names]
    found = busy.post("/v1/keywords/detect", COMPUTER).json()
    busy.post("/v1/speakers/hopper-9/verify", encoded(voice(3)))
    grown = [value(busy, name) - old for name, old in zip(names, before, strict=True)]
    assert grown == pytest.approx([found["duration_s"] + 3.0, len(found["detections"]), 1])


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/keywords/detect", "undecodable_audio"),
        ("/v1/nowhere", "not_found"),
        ("/v1/models", "method_not_allowed"),
    ],
)
def test_refusals_are_counted_by_their_code(busy: RunningService, path: str, code: str) -> None:
    def refused() -> float:
        return value(busy, "sotto_rejects_total", reason=code) if code in busy.get("/metrics").text else 0.0

    before = refused()
    assert busy.post(path, b"").json()["code"] == code
    assert refused() == before + 1


def test_nothing_waits_when_nothing_is_asked(busy: RunningService) -> None:
    assert value(busy, "sotto_queue_depth") == 0
    assert value(busy, "sotto_queued_audio_seconds") == 0


def test_the_model_is_named(busy: RunningService) -> None:
    default = busy.get("/v1/models").json()["default"]
    assert value(busy, "sotto_model_info", name=default["name"], version=str(default["version"])) == 1


def test_strangers_add_no_series(busy: RunningService) -> None:
    before = series(busy)
    surprises(busy, random.Random(1), count=40)
    assert series(busy) == before


def test_no_label_holds_what_callers_sent(busy: RunningService) -> None:
    assert all("hopper" not in text for _, labels in series(busy) for _, text in labels)


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=x", "application/openmetrics-text;version=", ";;"]
)
def test_whatever_a_scraper_accepts_it_gets_metrics(busy: RunningService, accept: str) -> None:
    response = busy.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    assert "sotto_ready" in response.text


def test_openmetrics_where_asked_for(busy: RunningService) -> None:
    response = busy.get("/metrics", headers={"Accept": OPENMETRICS})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics_parser.text_string_to_metric_families(response.text)}
    assert {"sotto_request_duration_seconds", "sotto_model", "sotto_rejects"} <= names


def test_plain_text_otherwise(busy: RunningService) -> None:
    assert busy.get("/metrics").headers["content-type"].startswith("text/plain")
