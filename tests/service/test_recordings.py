"""Real recordings, of people whom the model never heard, through HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.conftest import RunningService

OGG = {"Content-Type": "audio/ogg"}


def test_a_word_is_heard(service: RunningService, shared_data: Path) -> None:
    clip = (shared_data / "asc/backward/00000002_NO_01.opus").read_bytes()
    found = service.post("/v1/keywords/detect", clip, headers=OGG).json()
    assert [event["keyword"] for event in found["detections"]] == ["ar:backward"]


def test_a_person_is_known_and_another_is_not(service: RunningService, shared_data: Path) -> None:
    people = shared_data / "dsp20"
    for name in ("open_01", "close_02", "print_01"):
        clip = (people / f"16/{name}.opus").read_bytes()
        assert service.post("/v1/speakers/sixteen/enrollments", clip, headers=OGG).is_success
    try:
        same, other = (
            service.post("/v1/speakers/sixteen/verify", (people / f"{one}/speech_03.opus").read_bytes(), headers=OGG)
            for one in (16, 21)
        )
        assert (same.json()["accepted"], other.json()["accepted"]) == (True, False)
        said = (people / "16/open_02.opus").read_bytes()
        whole = service.post("/v1/analyze?tasks=keywords&tasks=speaker&speaker_id=sixteen", said, headers=OGG).json()
        (event,) = whole["keywords"]["detections"]
        assert (event["keyword"], event["spoken_by_speaker"]) == ("en:open", True)
    finally:
        assert httpx.delete(service.url + "/v1/speakers/sixteen").is_success
