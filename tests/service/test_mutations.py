"""A thousand damaged files through the real service: each gets an answer, none an accident."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.errors import PROBLEM_JSON
from tests.conftest import RunningService, encoded, voice

MUTANTS_OF_EACH = 300
THREADS = 4
BOUNDARY = "sotto-test-boundary"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
# What a damaged file may be told. Anything else, 5xx above all, is a fault of the service.
CODES = {"undecodable_audio", "malformed_body", "audio_too_large", "audio_too_short", "invalid_samples"}


def form(data: bytes) -> bytes:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\nContent-Type: audio/wav\r\n\r\n'
    )
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def corpus() -> dict[str, tuple[bytes, str]]:
    clip = voice(0.7)
    wav = encoded(clip)
    return {
        "wav": (wav, "audio/wav"),
        "wav-float": (encoded(clip, subtype="FLOAT"), "audio/wav"),
        "flac": (encoded(clip, container="FLAC"), "audio/flac"),
        "vorbis": (encoded(clip, container="OGG", subtype="VORBIS"), "audio/ogg"),
        "opus": (encoded(clip, container="OGG", subtype="OPUS"), "audio/ogg"),
        "mp3": (encoded(clip, container="MP3", subtype="MPEG_LAYER_III"), "audio/mpeg"),
        "form": (form(wav), FORM_TYPE),
    }


CORPUS = corpus()


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 3, 10, 100))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    other, _ = rng.choice(list(CORPUS.values()))
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Extreme numbers where sizes, rates and counts stand."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        width = rng.choice((1, 2, 4, 8))
        at = rng.randrange(min(200, len(damaged) - 8))
        value = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), rng.getrandbits(8 * width)))
        damaged[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return bytes(damaged)


def repeat(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:last] + data[first:last] * rng.randint(1, 3) + data[last:]


MUTATIONS = (flip_bits, truncate, splice, edit_header, repeat)


def mutants(name: str) -> list[bytes]:
    data, _ = CORPUS[name]
    rng = random.Random(f"sotto {name}")
    return [MUTATIONS[index % len(MUTATIONS)](data, rng) for index in range(MUTANTS_OF_EACH)]


def send(client: httpx.Client, data: bytes, content_type: str) -> str:
    """The outcome as a word; what the contract does not allow is spelt out."""
    response = client.post("/v1/keywords/detect", content=data, headers={"Content-Type": content_type})
    if response.status_code == 200:
        return "ok" if set(response.json()) == {"model", "duration_s", "detections", "top"} else response.text
    problem = response.json()
    sound = response.headers["content-type"] == PROBLEM_JSON and problem["status"] == response.status_code
    return problem["code"] if sound else f"{response.status_code} {response.text}"


@pytest.mark.parametrize("name", CORPUS)
def test_damaged_files_are_decoded_or_refused(service: RunningService, name: str) -> None:
    content_type = CORPUS[name][1]
    with httpx.Client(base_url=service.url, timeout=60) as client, ThreadPoolExecutor(THREADS) as threads:
        outcomes = Counter(threads.map(lambda data: send(client, data, content_type), mutants(name)))
    assert outcomes.total() == MUTANTS_OF_EACH
    assert set(outcomes) <= CODES | {"ok"}
    assert 0 < outcomes["ok"] < MUTANTS_OF_EACH


def test_the_corpus_is_large_and_damaged() -> None:
    everything = [data for name in CORPUS for data in mutants(name)]
    assert len(everything) >= 1000
    assert sum(data in [original for original, _ in CORPUS.values()] for data in everything) < 20


def test_the_service_outlives_them(service: RunningService) -> None:
    """Whatever ran before: the service is ready, decodes a sound clip, and has logged no traceback."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for name in CORPUS:
            for data in mutants(name)[:20]:
                send(client, data, CORPUS[name][1])
        assert send(client, *CORPUS["wav"]) == "ok"
    assert service.get("/readyz").status_code == 200
    assert "Traceback" not in service.log.read_text()
