"""What tests of routes ask with, and how they read an answer."""

from __future__ import annotations

from typing import Any

import httpx

from tests.conftest import REPOSITORY

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
