"""Forms: taken apart beside the event loop where they are large, and no longer than there is time for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service import intake
from service.app import create_app
from service.decoders import INLINE_BYTES
from service.errors import DeadlineExceededError
from service.multipart import PIECE_BYTES, audio_parts
from service.settings import Settings
from tests.conftest import LOCAL, encoded, voice

KIND = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="audio"\r\nContent-Type: audio/wav\r\n\r\n'
TAIL = b"\r\n--b--\r\n"


def soon() -> float:
    return time.monotonic() + 60


# Where the boundary after the data lies on both sides of a cut.
@pytest.mark.parametrize("beyond", range(-len(TAIL), 2))
def test_a_form_in_several_pieces(beyond: int) -> None:
    data = bytes(range(256)) * (2 * PIECE_BYTES // 256)
    data = data[: len(data) + beyond - len(HEAD)]
    assert audio_parts(HEAD + data + TAIL, KIND, at_most=1, deadline=soon()) == [(data, "audio/wav")]


def test_a_form_is_given_up_when_its_time_is_over() -> None:
    almost = b"\r\n--bX" * (PIECE_BYTES // 6 + 1)
    assert audio_parts(HEAD + almost + TAIL, KIND, at_most=1, deadline=soon())
    with pytest.raises(DeadlineExceededError):
        audio_parts(HEAD + almost + TAIL, KIND, at_most=1, deadline=time.monotonic())


def test_large_forms_are_taken_apart_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def watched(body: bytes, *arguments: str, at_most: int, deadline: float) -> list[tuple[bytes, str]]:
        seen.append((len(body) > INLINE_BYTES, threading.current_thread().name == "decoder"))
        return audio_parts(body, *arguments, at_most=at_most, deadline=deadline)

    monkeypatch.setattr(intake, "audio_parts", watched)
    with TestClient(create_app(Settings(data_dir=tmp_path, inference_threads=1)), LOCAL) as client:
        for duration_s in (1.0, 3.0):
            form = {"audio": ("clip.wav", encoded(voice(duration_s)), "audio/wav")}
            assert client.post("/v1/keywords/detect", files=form).status_code == 200
    assert seen == [(False, False), (True, True)]
