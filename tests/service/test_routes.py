"""What each route answers when all is well, over HTTP; those of speakers are in test_speaker_routes.py."""

from __future__ import annotations

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from model_store import LocalStore, Manifest
from service.routes.embeddings import FRAMES_AT_ONCE
from tests.conftest import REPOSITORY, RunningService, Samples, encoded, voice
from tests.service.asking import (
    ADA,
    ANALYZE,
    COMPUTER,
    DETECT,
    EMBEDDINGS,
    FIVE_WORDS,
    answer,
    several,
)


def test_a_keyword_is_found_where_it_is(service: RunningService, manifest: Manifest) -> None:
    body = answer(service.post(DETECT, COMPUTER))
    assert body["model"] == {"name": manifest.name, "version": manifest.version}
    assert body["duration_s"] == pytest.approx(1.215, abs=0.001)
    (found,) = body["detections"]
    assert found["keyword"] == "en:computer"
    assert 0 <= found["start_s"] < found["end_s"] <= body["duration_s"]
    assert 0.5 < found["score"] <= 1


def test_raw_and_form_answer_alike(service: RunningService) -> None:
    assert answer(service.post(DETECT, files=several(COMPUTER))) == answer(service.post(DETECT, COMPUTER))


def test_raw_samples_in_a_form(service: RunningService) -> None:
    pcm = (voice(1.0) * 32767).astype("<i2").tobytes()
    form = {"audio": ("a", pcm, "audio/pcm;rate=16000")}
    assert answer(service.post(DETECT, files=form)) == answer(service.post(DETECT, pcm, "audio/pcm;rate=16000"))


def test_other_fields_of_a_form_are_ignored(service: RunningService) -> None:
    response = service.post(DETECT, files=[("note", (None, b"hello")), *several(COMPUTER)])
    assert answer(response) == answer(service.post(DETECT, COMPUTER))


def test_only_the_keywords_asked_for(service: RunningService) -> None:
    wanted = ["en:alexa", "en:jarvis"]
    body = answer(service.post(DETECT, FIVE_WORDS, params={"keywords": wanted}))
    assert [found["keyword"] for found in body["detections"]] == wanted
    assert {ranked["keyword"] for ranked in body["top"]} == set(wanted)


def test_a_threshold_of_one_lets_nothing_pass_and_a_low_one_more(service: RunningService) -> None:
    counts = [len(answer(service.post(DETECT, FIVE_WORDS, params={"threshold": t}))["detections"]) for t in (1, 0.5, 0)]
    assert counts[0] == 0
    assert counts[0] < counts[1] <= counts[2]


@pytest.mark.parametrize(("asked", "given"), [(None, 5), (0, 0), (1, 1), (7, 7), (500, 112)])
def test_the_ranking_is_as_long_as_asked(service: RunningService, manifest: Manifest, asked: int, given: int) -> None:
    params = {} if asked is None else {"top_k": asked}
    top = answer(service.post(DETECT, COMPUTER, params=params))["top"]
    assert len(top) == min(given, len(manifest.keywords.labels))
    scores = [ranked["score"] for ranked in top]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("reference", ["sotto-edge", "sotto-edge@{version}", "sotto-edge@production"])
def test_a_model_by_each_of_its_names(service: RunningService, manifest: Manifest, reference: str) -> None:
    params = {"model": reference.format(version=manifest.version)}
    assert answer(service.post(DETECT, COMPUTER, params=params)) == answer(service.post(DETECT, COMPUTER))


def test_a_minute_holds_what_its_parts_hold(service: RunningService) -> None:
    samples, rate_hz = soundfile.read(REPOSITORY / "examples" / "five-words.wav", dtype="float32")
    minute = np.zeros(60 * rate_hz, dtype=np.float32)
    minute[: 5 * len(samples)] = np.tile(samples, 5)
    alone = answer(service.post(DETECT, FIVE_WORDS))["detections"]
    body = answer(service.post(DETECT, encoded(minute, rate_hz=rate_hz, container="FLAC"), "audio/flac"))
    assert body["duration_s"] == 60.0
    assert [found["keyword"] for found in body["detections"]] == [found["keyword"] for found in alone] * 5
    shifts_s = [part * len(samples) / rate_hz for part in range(5) for _ in alone]
    starts_s = [found["start_s"] for found in body["detections"]]
    np.testing.assert_allclose(starts_s, np.add(shifts_s, [found["start_s"] for found in alone] * 5), atol=0.1)


def test_the_keywords_are_those_of_the_manifest(service: RunningService, manifest: Manifest) -> None:
    body = answer(service.get("/v1/keywords"))
    assert body["thresholds_from"]
    listed = {entry["keyword"]: entry["threshold"] for entry in body["keywords"]}
    assert listed == {keyword.label: keyword.threshold for keyword in manifest.keywords.labels}
    assert all(f"{entry['language']}:{entry['word']}" == entry["keyword"] for entry in body["keywords"])


def test_every_answer_says_how_long_it_took(service: RunningService) -> None:
    for path in ("/healthz", "/nowhere", "/v1/models"):
        assert re.fullmatch(r"total;dur=[0-9.]+", service.get(path).headers["server-timing"])


@pytest.mark.parametrize("kind", ["speaker", "utterance", "frames"])
def test_embeddings_as_numbers_and_as_bytes(service: RunningService, manifest: Manifest, kind: str) -> None:
    numbers = answer(service.post(EMBEDDINGS, COMPUTER, params={"type": kind}))
    coded = answer(service.post(EMBEDDINGS, COMPUTER, params={"type": kind, "encoding": "base64"}))
    dim = manifest.speaker.dim if kind == "speaker" else manifest.embedding.dim
    values = np.array(numbers["data"][0]["embedding"], dtype=np.float32)
    assert numbers["dim"] == coded["dim"] == values.shape[-1] == dim
    raw = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"], validate=True), dtype="<f4")
    np.testing.assert_array_equal(raw, values.ravel())
    if kind == "frames":
        assert len(values) == numbers["data"][0]["frames"]
        assert len(values) * numbers["frame_hop_s"] == pytest.approx(numbers["data"][0]["duration_s"], abs=0.05)
    else:
        assert np.linalg.norm(values) == pytest.approx(1, abs=1e-4)


def test_frames_of_several_long_clips_come_whole(service: RunningService) -> None:
    """They are written piece by piece."""
    clips = [encoded(voice(seconds, **ADA)) for seconds in (9.0, 1.0)]
    query = {"type": "frames"}
    numbers = answer(service.post(EMBEDDINGS, files=several(*clips), params=query))
    coded = answer(service.post(EMBEDDINGS, files=several(*clips), params={**query, "encoding": "base64"}))
    for entry, same in zip(numbers["data"], coded["data"], strict=True):
        values = np.array(entry.pop("embedding"), dtype=np.float32)
        raw = np.frombuffer(base64.b64decode(same.pop("embedding"), validate=True), dtype="<f4")
        np.testing.assert_array_equal(raw, values.ravel())
        assert entry == same == {"index": entry["index"], "frames": len(values), "duration_s": entry["duration_s"]}
    assert [(entry["index"], entry["duration_s"]) for entry in numbers["data"]] == [(0, 9.0), (1, 1.0)]
    assert numbers["data"][0]["frames"] > FRAMES_AT_ONCE


def test_embeddings_come_in_the_order_of_the_clips(service: RunningService) -> None:
    clips = [encoded(voice(seconds, seed=seed, **ADA)) for seed, seconds in enumerate((3.0, 1.0, 2.0))]
    data = answer(service.post(EMBEDDINGS, files=several(*clips)))["data"]
    assert [(entry["index"], entry["duration_s"]) for entry in data] == [(0, 3.0), (1, 1.0), (2, 2.0)]
    for clip, entry in zip(clips, data, strict=True):
        (alone,) = answer(service.post(EMBEDDINGS, clip))["data"]
        np.testing.assert_allclose(entry["embedding"], alone["embedding"], atol=1e-4)


@pytest.mark.parametrize("tasks", [["keywords"], ["speaker"], ["embedding"], ["embedding", "keywords"]])
def test_analysis_gives_the_parts_asked_for(service: RunningService, tasks: list[str]) -> None:
    body = answer(service.post(ANALYZE, COMPUTER, params={"tasks": tasks}))
    assert set(body) == {"model", "duration_s", *tasks}


def test_analysis_agrees_with_the_routes_it_joins(service: RunningService) -> None:
    body = answer(service.post(ANALYZE, COMPUTER))
    detected = answer(service.post(DETECT, COMPUTER))
    assert body["keywords"] == {"detections": detected["detections"], "top": detected["top"]}
    for part, kind in (("speaker", "speaker"), ("embedding", "utterance")):
        alone = answer(service.post(EMBEDDINGS, COMPUTER, params={"type": kind}))["data"][0]["embedding"]
        np.testing.assert_allclose(body[part]["embedding"], alone, atol=1e-4)


def test_analysis_says_who_spoke(service: RunningService, ada: str) -> None:
    body = answer(service.post(ANALYZE, FIVE_WORDS, params={"speaker_id": ada}))
    assert len(body["keywords"]["detections"]) >= 3
    assert all(isinstance(found["spoken_by_speaker"], bool) for found in body["keywords"]["detections"])
    verification = body["speaker"]["verification"]
    alone = answer(service.post(f"/v1/speakers/{ada}/verify", FIVE_WORDS))
    assert verification["speaker_id"] == ada
    assert verification["score"] == pytest.approx(alone["score"], abs=0.01)


def test_the_words_of_an_enrolled_voice_are_its_own(service: RunningService, speakers: str) -> None:
    answer(service.post(f"/v1/speakers/{speakers}reader/enrollments", FIVE_WORDS))
    body = answer(service.post(ANALYZE, FIVE_WORDS, params={"speaker_id": f"{speakers}reader", "tasks": "keywords"}))
    own = [found["spoken_by_speaker"] for found in body["keywords"]["detections"]]
    assert sum(own) > len(own) / 2


def test_models_are_listed_and_shown(service: RunningService, builtin_store: LocalStore, manifest: Manifest) -> None:
    body = answer(service.get("/v1/models"))
    assert body["default"] == {"name": manifest.name, "version": manifest.version}
    (shown,) = [model for model in body["models"] if model["name"] == manifest.name]
    assert shown == answer(service.get(f"/v1/models/{manifest.name}"))
    assert shown["aliases"]["production"] == manifest.version
    (loaded,) = [version for version in shown["versions"] if version["loaded"]]
    assert loaded["digest"] == builtin_store.resolve("sotto-edge").digest
    assert loaded["keywords"] == len(manifest.keywords.labels)


def test_request_ids_are_echoed_or_made(service: RunningService) -> None:
    assert service.get("/healthz", headers={"X-Request-ID": "abc-123"}).headers["x-request-id"] == "abc-123"
    made = {service.get("/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in made)


@pytest.mark.parametrize("offered", ["x" * 129, "a b", 'a"b', "<script>"])
def test_a_request_id_that_could_do_harm_is_replaced(service: RunningService, offered: str) -> None:
    assert service.get("/healthz", headers={"X-Request-ID": offered}).headers["x-request-id"] != offered


@pytest.mark.parametrize("path", [DETECT, EMBEDDINGS, ANALYZE])
def test_the_time_of_each_stage_is_told(service: RunningService, path: str) -> None:
    response = service.post(path, COMPUTER)
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
    assert {"decode", "queue", "inference", "postprocess"} <= set(stages)
    assert 0 < sum(map(float, stages.values())) <= response.elapsed.total_seconds() * 1000 + 1


def test_health_and_readiness(service: RunningService) -> None:
    assert answer(service.get("/healthz")) == {"status": "ok"}
    checks = {"accepting": True, "decoding": True, "inference": True, "profiles": True}
    assert answer(service.get("/readyz")) == {"ready": True, "checks": checks}


def neighbours() -> list[Samples]:
    rng = np.random.default_rng(3)
    loud = rng.uniform(-1, 1, 20_000).astype(np.float32)
    return [loud, np.zeros(16_000, dtype=np.float32), voice(9.0), voice(0.2), voice(1.4, seed=8)]


def test_a_clip_does_not_feel_its_neighbours(service: RunningService) -> None:
    alone = [answer(service.post(ANALYZE, clip)) for clip in (COMPUTER, FIVE_WORDS)]
    noise = [encoded(samples) for samples in neighbours()]

    def visit(turn: int) -> dict[str, Any] | None:
        if turn % 2:
            service.post(DETECT, noise[turn // 2 % len(noise)])
            return None
        return answer(service.post(ANALYZE, (COMPUTER, FIVE_WORDS)[turn // 2 % 2]))

    with ThreadPoolExecutor(16) as threads:
        answers = [body for body in threads.map(visit, range(64)) if body is not None]
    for turn, body in enumerate(answers):
        before = alone[turn % 2]
        words = [found["keyword"] for found in body["keywords"]["detections"]]
        assert words == [found["keyword"] for found in before["keywords"]["detections"]]
        for part in ("speaker", "embedding"):
            np.testing.assert_allclose(body[part]["embedding"], before[part]["embedding"], atol=1e-4)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_ask_for_the_head_alone(service: RunningService, path: str) -> None:
    response = httpx.head(service.url + path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == service.get(path).headers["content-length"]
