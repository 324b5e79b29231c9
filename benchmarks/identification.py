"""How long it takes to tell whose voice it is, among how many."""

from __future__ import annotations

import base64
import io
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import soundfile

from benchmarks.clients import Setting, median
from benchmarks.servers import Server, sotto
from model_store import Bundle
from model_store.verify import read_cohort
from service.speakers.store import ProfileStore

PEOPLE = (1_000, 10_000, 100_000, 1_000_000)
# Those among whom everyone is also read for each request.
FEW = 100_000
MEMORY_BYTES = 2**31
REQUESTS = 40
EXACT = 10
BLOCK = 20_000
VOICE = Path(__file__).parents[1] / "examples" / "five-words.wav"
WAV = {"Content-Type": "audio/wav"}

Vectors = npt.NDArray[np.float32]


def identify(setting: Setting) -> list[str]:
    """One request after the other; vectors held in memory, and read for each request."""
    lines = [
        "## identify",
        "",
        f"Whose voice is in stretches of {VOICE.name}, among people with one vector each, drawn at random, in SQLite: "
        f"milliseconds of the first request, and of the {REQUESTS} after it, one at a time; of the request after a "
        "clip was enrolled; and where every profile is read for each request (`SOTTO_PROFILES_MEMORY_BYTES=0`). "
        f"Recall: how often the first candidate is that of an exact search in float64, for {EXACT} of them.",
        "",
        "| people | recall@1 | first | p50 | p99 | after an enrolment | p50 without memory | resident MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for people in PEOPLE:
        url = f"sqlite:///{setting.folder / f'{people}.sqlite3'}"
        vectors = _enrol(url, setting.bundle, people)
        # The first request among many takes longer than the default allows.
        given = {"database_url": url, "request_timeout_s": "120"}
        with (
            sotto(setting.bundle, profiles_memory_bytes=str(MEMORY_BYTES), **given) as server,
            _client(server) as client,
        ):
            clips = list(_stretches(REQUESTS + 1))
            found, times = zip(*(_identified(client, clip) for clip in clips), strict=True)
            exact = [_name(_exact(vectors, _embedding(client, clip), setting.bundle)) for clip in clips[:EXACT]]
            after = [_after_enrolment_ms(client, number, clip) for number, clip in enumerate(_stretches(5))]
            resident = server.resident_bytes / 2**20
        recall = np.mean([name == best for name, best in zip(found, exact, strict=False)])
        without = "-"
        if people <= FEW:
            with sotto(setting.bundle, profiles_memory_bytes="0", **given) as server, _client(server) as client:
                without = f"{median(_identified(client, clip)[1] for clip in _stretches(5)):.0f}"
        lines.append(
            f"| {people:,} | {recall:.2f} | {times[0]:.0f} | {median(times[1:]):.1f} | "
            f"{np.percentile(times[1:], 99):.1f} | {median(after):.1f} | {without} | {resident:.0f} |"
        )
    return lines


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120)


def _stretches(count: int) -> Iterator[bytes]:
    """Of two seconds, each beginning elsewhere."""
    samples, rate = soundfile.read(VOICE, dtype="float32")
    for start in np.linspace(0, len(samples) - 2 * rate, count).astype(int):
        stream = io.BytesIO()
        soundfile.write(stream, samples[start : start + 2 * rate], rate, format="WAV", subtype="PCM_16")
        yield stream.getvalue()


def _identified(client: httpx.Client, clip: bytes) -> tuple[str, float]:
    """The first candidate, and milliseconds."""
    begin = time.perf_counter()
    answer = client.post("/v1/speakers/identify", content=clip, headers=WAV)
    time_ms = (time.perf_counter() - begin) * 1e3
    return answer.raise_for_status().json()["candidates"][0]["speaker_id"], time_ms


def _after_enrolment_ms(client: httpx.Client, number: int, clip: bytes) -> float:
    client.post(f"/v1/speakers/new-{number}/enrollments", content=clip, headers=WAV).raise_for_status()
    return _identified(client, clip)[1]


def _embedding(client: httpx.Client, clip: bytes) -> npt.NDArray[np.float64]:
    query = {"type": "speaker", "encoding": "base64"}
    answer = client.post("/v1/embeddings", content=clip, headers=WAV, params=query).raise_for_status().json()
    coded = base64.b64decode(answer["data"][0]["embedding"])
    return np.frombuffer(coded, dtype="<f4").astype(np.float64)


def _exact(vectors: Vectors, test: npt.NDArray[np.float64], bundle: Bundle) -> int:
    """Row of the best, by the formula that `service.speakers.scoring` names and by nothing else of it. What is the same
    for all rows is left out: the calibration, and the test's own side, which their cosine reaches by one factor."""
    speaker = bundle.manifest.speaker
    assert speaker is not None
    assert speaker.cohort_file is not None
    cohort = read_cohort(bundle.read(speaker.cohort_file), speaker.dim).astype(np.float64)
    own = np.sort(cohort @ test)[-speaker.cohort_top :].std()
    best, row = -np.inf, 0
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].astype(np.float64)
        closest = np.partition(block @ cohort.T, -speaker.cohort_top, axis=1)[:, -speaker.cohort_top :]
        cosines = block @ test
        scores = (cosines - closest.mean(axis=1)) / closest.std(axis=1) + cosines / own
        if scores.max() > best:
            best, row = scores.max(), start + int(scores.argmax())
    return row


def _name(row: int) -> str:
    return f"person-{row:07}"


def _enrol(url: str, bundle: Bundle, people: int) -> Vectors:
    """[people, D], put straight into the tables: through the service each would be synchronised to the disk."""
    ProfileStore(url).close()
    manifest = bundle.manifest
    assert manifest.speaker is not None
    vectors = np.random.default_rng(0).standard_normal((people, manifest.speaker.dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    moment = "2026-01-01 00:00:00.000000"
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.executemany(
            "INSERT INTO speakers (id, tenant, speaker_id, created_at, updated_at, revision) VALUES (?, ?, ?, ?, ?, ?)",
            ((row + 1, "default", _name(row), moment, moment, row + 1) for row in range(people)),
        )
        connection.execute("INSERT INTO revisions VALUES ('default', ?)", (people,))
        connection.executemany(
            "INSERT INTO enrolments (speaker, model_name, model_version, embedding, speech_s, snr_db, created_at) "
            "VALUES (?, ?, ?, ?, 2.0, 20.0, ?)",
            (
                (row + 1, manifest.name, manifest.version, vector.astype("<f4").tobytes(), moment)
                for row, vector in enumerate(vectors)
            ),
        )
    connection.close()
    return vectors
