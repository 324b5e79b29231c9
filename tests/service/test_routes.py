"""What each route answers when all is well, over HTTP."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from model_store import LocalStore, Manifest
from service.app import create_app
from service.routes import identify
from service.routes.embeddings import FRAMES_AT_ONCE
from service.settings import Settings
from service.speakers import roster
from tests.conftest import LOCAL, REPOSITORY, RunningService, Samples, encoded, voice

COMPUTER = (REPOSITORY / "examples" / "computer.wav").read_bytes()
FIVE_WORDS = (REPOSITORY / "examples" / "five-words.wav").read_bytes()
DETECT, EMBEDDINGS, ANALYZE = "/v1/keywords/detect", "/v1/embeddings", "/v1/analyze"
IDENTIFY = "/v1/speakers/identify"
WAV = {"Content-Type": "audio/wav"}
ADA, BOB = {"pitch_hz": 110.0}, {"pitch_hz": 230.0}


def answer(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def several(*clips: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("audio", (f"{index}.wav", clip, "audio/wav")) for index, clip in enumerate(clips)]


@pytest.fixture(scope="module")
def manifest(builtin_store: LocalStore) -> Manifest:
    return builtin_store.resolve("sotto-edge").manifest


@pytest.fixture
def speakers(service: RunningService) -> Iterator[str]:
    """A prefix for speaker ids; whoever has it is gone afterwards."""
    prefix = "routes-"
    yield prefix
    for speaker in answer(service.get("/v1/speakers", params={"limit": 1000}))["speakers"]:
        if speaker["speaker_id"].startswith(prefix):
            assert httpx.delete(f"{service.url}/v1/speakers/{speaker['speaker_id']}").status_code == 204


@pytest.fixture
def ada(service: RunningService, speakers: str) -> str:
    """The id of an enrolled speaker."""
    body = answer(service.post(f"/v1/speakers/{speakers}ada/enrollments", encoded(voice(6, **ADA))))
    assert body["status"] == "enrolled"
    return body["speaker_id"]


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


def test_a_profile_grows_until_enough_was_said(service: RunningService, speakers: str) -> None:
    path = f"/v1/speakers/{speakers}bob/enrollments"
    first = answer(service.post(path, encoded(voice(2, **BOB))))
    assert (first["status"], first["enrollments"], first["required_speech_s"]) == ("enrolling", 1, 2.0)
    assert first["speech_s"] == first["clips"][0]["speech_s"] < 2.0
    second = answer(service.post(path, encoded(voice(2, seed=1, **BOB))))
    assert (second["status"], second["enrollments"]) == ("enrolled", 2)
    assert second["speech_s"] == pytest.approx(first["speech_s"] + second["clips"][0]["speech_s"], abs=0.002)


def test_several_clips_are_judged_one_by_one(service: RunningService, speakers: str) -> None:
    short, quiet = encoded(voice(0.2, **ADA)), encoded(np.zeros(16_000, dtype=np.float32))
    clips = several(encoded(voice(3, **ADA)), short, quiet, encoded(voice(3, seed=2, **ADA)))
    body = answer(service.post(f"/v1/speakers/{speakers}eve/enrollments", files=clips))
    assert [clip["reason"] for clip in body["clips"]] == [None, "too_short", "no_speech", None]
    assert (body["enrollments"], body["status"]) == (2, "enrolled")


def test_a_clip_too_short_for_the_model_harms_no_other(service: RunningService, speakers: str) -> None:
    clips = [encoded(voice(1.5, **ADA)), encoded(voice(0.02, **ADA)), encoded(voice(1.5, seed=2, **ADA))]
    told = answer(service.post(f"/v1/speakers/{speakers}-short/enrollments", files=several(*clips)))
    assert [clip["reason"] for clip in told["clips"]] == [None, "too_short", None]
    assert told["enrollments"] == 2


def test_what_is_wrong_with_one_clip_of_several_is_said_of_that_one(service: RunningService, speakers: str) -> None:
    clips = several(encoded(voice(1.5, **ADA)), b"no audio at all")
    for path in (EMBEDDINGS, f"/v1/speakers/{speakers}-odd/enrollments"):
        refused = service.post(path, files=clips)
        assert (refused.status_code, refused.json()["code"]) == (400, "undecodable_audio")
        assert refused.json()["detail"].startswith("clip 1: ")
    assert service.get(f"/v1/speakers/{speakers}-odd").status_code == 404


def test_every_answer_says_how_long_it_took(service: RunningService) -> None:
    for path in ("/healthz", "/nowhere", "/v1/models"):
        assert re.fullmatch(r"total;dur=[0-9.]+", service.get(path).headers["server-timing"])


def test_verification_tells_a_voice_from_another(service: RunningService, ada: str) -> None:
    path = f"/v1/speakers/{ada}/verify"
    same = answer(service.post(path, encoded(voice(3, seed=5, **ADA))))
    other = answer(service.post(path, encoded(voice(3, seed=5, **BOB))))
    for body in (same, other):
        assert body["speaker_id"] == ada
        assert all(math.isfinite(body[name]) for name in ("score", "cosine", "speech_s", "snr_db"))
        assert body["accepted"] == (body["score"] >= body["threshold"])
        assert body["probability"] == pytest.approx(1 / (1 + math.exp(-body["score"])), abs=1e-4)
    assert same["cosine"] > other["cosine"]
    assert same["score"] > other["score"]


def test_whoever_fears_strangers_more_asks_for_a_rate_of_false_accepts(
    service: RunningService, manifest: Manifest, ada: str
) -> None:
    assert manifest.speaker is not None
    points = {point.false_accept_rate: point.threshold for point in manifest.speaker.operating_points}
    listed = answer(service.get("/v1/models/sotto-edge"))["versions"]
    own = next(one for one in listed if one["version"] == manifest.version)
    assert {point["false_accept_rate"]: point["threshold"] for point in own["operating_points"]} == points
    # The rarer, the stricter.
    assert 0 < points[0.01] < points[0.001]
    clip = encoded(voice(3, seed=5, **ADA))
    for path, claim in (
        (f"/v1/speakers/{ada}/verify", lambda body: (body["threshold"], body["accepted"], body["score"])),
        (IDENTIFY, lambda body: (body["threshold"], body["identified"] == ada, body["candidates"][0]["score"])),
        (
            f"{ANALYZE}?speaker_id={ada}",
            lambda body: tuple(body["speaker"]["verification"][name] for name in ("threshold", "accepted", "score")),
        ),
    ):
        at = "&" if "?" in path else "?"
        for rate, wanted in points.items():
            threshold, accepted, score = claim(answer(service.post(f"{path}{at}false_accept_rate={rate}", clip)))
            assert (threshold, accepted) == (wanted, score >= wanted)
        for nonsense in ("0.02", "0", "1", "often"):
            refused = service.post(f"{path}{at}false_accept_rate={nonsense}", clip)
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    unclaimed = service.post(f"{ANALYZE}?false_accept_rate=0.01", clip)
    assert "needs speaker_id" in unclaimed.json()["detail"]


def test_a_profile_with_too_little_speech_verifies_no_one(service: RunningService, speakers: str) -> None:
    answer(service.post(f"/v1/speakers/{speakers}dan/enrollments", encoded(voice(1, **ADA))))
    response = service.post(f"/v1/speakers/{speakers}dan/verify", encoded(voice(2, **ADA)))
    assert (response.status_code, response.json()["code"]) == (409, "profile_incomplete")


def test_a_voice_is_found_among_the_enrolled(service: RunningService, ada: str, speakers: str) -> None:
    answer(service.post(f"/v1/speakers/{speakers}bob/enrollments", encoded(voice(4, **BOB))))
    answer(service.post(f"/v1/speakers/{speakers}short/enrollments", encoded(voice(1, **ADA))))
    clip = encoded(voice(3, seed=5, **ADA))
    body = answer(service.post(IDENTIFY, clip, params={"top_k": 1000}))
    verified = answer(service.post(f"/v1/speakers/{ada}/verify", clip))
    own = {found["speaker_id"]: found for found in body["candidates"] if found["speaker_id"].startswith(speakers)}
    assert own.keys() == {ada, f"{speakers}bob"}
    assert {name: own[ada][name] for name in ("score", "probability", "cosine")} == pytest.approx(
        {name: verified[name] for name in ("score", "probability", "cosine")}, abs=1e-3
    )
    assert body["compared"] == len(body["candidates"])
    assert body["skipped"] == 1  # still enrolling
    scores = [found["score"] for found in body["candidates"]]
    assert scores == sorted(scores, reverse=True)
    best = body["candidates"][0]
    assert body["identified"] == (best["speaker_id"] if best["score"] >= body["threshold"] else None)
    assert own[ada]["score"] > own[f"{speakers}bob"]["score"]


def test_only_the_named_are_compared(service: RunningService, ada: str, speakers: str) -> None:
    bob = f"{speakers}bob"
    answer(service.post(f"/v1/speakers/{bob}/enrollments", encoded(voice(4, **BOB))))
    clip = encoded(voice(3, seed=5, **ADA))
    body = answer(service.post(IDENTIFY, clip, params={"candidates": [bob, bob]}))
    assert ([found["speaker_id"] for found in body["candidates"]], body["compared"]) == ([bob], 1)
    both = answer(service.post(IDENTIFY, clip, params={"candidates": [bob, ada], "top_k": 1}))
    assert ([found["speaker_id"] for found in both["candidates"]], both["compared"]) == ([ada], 2)


def test_named_candidates_must_be_there_and_ready(service: RunningService, ada: str, speakers: str) -> None:
    clip = encoded(voice(2, **ADA))
    answer(service.post(f"/v1/speakers/{speakers}short/enrollments", encoded(voice(1, **ADA))))
    for other, expected in (
        (f"{speakers}nobody", (404, "not_found")),
        (f"{speakers}short", (409, "profile_incomplete")),
    ):
        response = service.post(IDENTIFY, clip, params={"candidates": [ada, other]})
        assert (response.status_code, response.json()["code"]) == expected
        assert other in response.json()["detail"]


@pytest.mark.parametrize("candidates", [[""], ["a\0b"], ["../x"], ["x" * 129], ["x"] * 1001])
def test_candidates_that_cannot_be_are_refused(service: RunningService, candidates: list[str]) -> None:
    response = service.post(IDENTIFY, encoded(voice(2)), params={"candidates": candidates})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("memory", [0, 2**20], ids=["read each time", "held"])
def test_all_profiles_are_compared_page_by_page(tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = encoded(voice(3, seed=5, **ADA))
    with TestClient(create_app(Settings(data_dir=tmp_path, profiles_memory_bytes=memory)), LOCAL) as service:
        for name, pitch in (("ada", ADA), ("bob", BOB), ("cy", {"pitch_hz": 160.0})):
            answer(service.post(f"/v1/speakers/{name}/enrollments", content=encoded(voice(4, **pitch)), headers=WAV))
        whole = answer(service.post(IDENTIFY, content=clip, headers=WAV))
        assert (len(whole["candidates"]), whole["candidates"][0]["speaker_id"]) == (3, "ada")
        for page in (1, 2, 3):
            for module in (identify, roster):
                monkeypatch.setattr(module, "PAGE", page)
            assert answer(service.post(IDENTIFY, content=clip, headers=WAV)) == whole
        first = answer(service.post(IDENTIFY, content=clip, headers=WAV, params={"top_k": 1}))
        assert (first["candidates"], first["compared"]) == (whole["candidates"][:1], 3)


def test_nobody_is_identified_where_nobody_is_enrolled(tmp_path: Path) -> None:
    with TestClient(create_app(Settings(data_dir=tmp_path)), LOCAL) as service:
        body = answer(service.post(IDENTIFY, content=encoded(voice(3)), headers=WAV))
    assert (body["candidates"], body["identified"], body["compared"]) == ([], None, 0)


def test_pages_cover_all_speakers_once(service: RunningService, speakers: str) -> None:
    made = [f"{speakers}{name}" for name in ("p1", "p2", "p3", "p4")]
    for speaker in reversed(made):
        answer(service.post(f"/v1/speakers/{speaker}/enrollments", encoded(voice(1, **ADA))))
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 1}
    while True:
        page = answer(service.get("/v1/speakers", params=params))
        seen += [speaker["speaker_id"] for speaker in page["speakers"]]
        if page["next_cursor"] is None:
            break
        assert len(page["speakers"]) == 1
        params["cursor"] = page["next_cursor"]
    assert [speaker for speaker in seen if speaker.startswith(speakers)] == made
    assert seen == sorted(set(seen))


def test_a_speaker_is_shown_without_the_voice(service: RunningService, manifest: Manifest, ada: str) -> None:
    body = answer(service.get(f"/v1/speakers/{ada}"))
    assert set(body) == {
        "speaker_id", "status", "enrollments", "speech_s", "required_speech_s", "models", "created_at", "updated_at"
    }  # fmt: skip
    # Under the version whose embeddings these are, which several may share.
    name, _, version = manifest.speaker_space.partition("@")
    assert body["models"] == [{"name": name, "version": int(version)}]
    assert body["created_at"].endswith("Z")


def test_a_deleted_speaker_is_gone(service: RunningService, ada: str) -> None:
    url = f"{service.url}/v1/speakers/{ada}"
    first, second = httpx.delete(url), httpx.delete(url)
    assert (first.status_code, first.content, second.status_code) == (204, b"", 404)
    assert httpx.get(url).status_code == 404


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
    checks = {"accepting": True, "inference": True, "profiles": True}
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
