"""What the routes of speakers answer when all is well, over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from model_store import Manifest
from service.app import create_app
from service.routes import identify
from service.settings import Settings
from service.speakers import roster
from tests.conftest import LOCAL, RunningService, encoded, voice
from tests.service.asking import (
    ADA,
    ANALYZE,
    BOB,
    EMBEDDINGS,
    IDENTIFY,
    WAV,
    answer,
    several,
)


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
