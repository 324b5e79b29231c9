"""Words in a stream that the bundle's streaming graph hears: each told once, with times, from bounded memory."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from model_store import KeywordInfo, LocalStore, StreamInfo
from model_store.inference import Session
from model_store.streaming import ENDLESS, Chunk, Progress, StreamingGraph
from service.audio import SAMPLE_RATE_HZ
from service.keywords import Array, Detection, allowed_labels
from service.streaming import MOST_FRAMES, FrameStream, Pace, Span, Spotter

HOP = 800
DELAY = 6
WORDS = 3
Said = list[tuple[float, float, int]]


@pytest.fixture(scope="module")
def info(builtin_store: LocalStore) -> KeywordInfo:
    manifest = builtin_store.resolve("sotto-edge").manifest
    return manifest.keywords.model_copy(update={"labels": manifest.keywords.labels[:WORDS], "window_s": 1.0})


def stream_of(info: KeywordInfo) -> FrameStream:
    graph = StreamingGraph(
        cast(Session, None), StreamInfo(file="stream.onnx", delay_frames=DELAY, state_size=1), hop=HOP
    )
    spotter = Spotter(info, Pace(), allowed_labels(info, []), 0.5)
    return FrameStream(info, Pace(), spotter, graph, shortest_s=0.1)


def computed(chunk: Chunk, said: Said, less: int = 0) -> tuple[Array, Progress]:
    """As if the network heard, from second to second, the keyword with that number; every other by `less`."""
    count = len(chunk.samples) // HOP
    first = chunk.progress.position - DELAY
    frames = np.arange(max(0, first), max(0, min(first + count, -(-chunk.length // HOP))))
    found = np.full((len(frames), 1 + WORDS), -6.0, np.float32)
    found[:, 0] = 6.0
    for order, (start_s, end_s, number) in enumerate(said):
        times = frames * HOP / SAMPLE_RATE_HZ
        found[(start_s <= times) & (times < end_s), 1 + number] = 9.0 - less * (order % 2)
    return found, Progress(chunk.progress.position + count, chunk.progress.state)


def told(info: KeywordInfo, said: Said, *, seconds: float, size: int, less: int = 0) -> list[tuple[str, float, float]]:
    """(keyword, start, when it was told), in seconds of audio."""
    stream, events = stream_of(info), []
    samples = np.zeros(int(seconds * SAMPLE_RATE_HZ), np.float32)
    for start in range(0, len(samples), size):
        for piece in stream.push(samples[start : start + size]):
            found = stream.settle(piece, *computed(stream.chunk(piece), said, less))
            events += [(one.keyword, round(one.start_s, 1), (start + size) / SAMPLE_RATE_HZ) for one in found]
    for piece in stream.flush():
        found = stream.settle(piece, *computed(stream.chunk(piece), said, less))
        events += [(one.keyword, round(one.start_s, 1), seconds) for one in found]
    return events


@pytest.mark.parametrize("size", [1, 160, 4_000, 4_001, 48_000, 96_000])
def test_each_word_is_told_once_however_the_audio_comes(info: KeywordInfo, size: int) -> None:
    first, second = info.labels[0].label, info.labels[1].label
    said = [(0.3, 0.8, 0), (2.0, 2.5, 1), (3.6, 4.1, 0), (5.2, 5.7, 0)]
    wanted = [(first, 0.3), (second, 2.0), (first, 3.6), (first, 5.2)]
    assert [event[:2] for event in told(info, said, seconds=6.0, size=size)] == wanted


@pytest.mark.parametrize("size", [320, 4_000, 32_000])
@pytest.mark.parametrize("every_s", [1.2, 1.5])
@pytest.mark.parametrize("window_s", [1.0, 1.6])
def test_a_word_said_again_and_again_is_told_each_time(
    info: KeywordInfo, size: int, every_s: float, window_s: float
) -> None:
    own = info.model_copy(update={"window_s": window_s})
    said = [(1.0 + number * every_s, 1.4 + number * every_s, 0) for number in range(8)]
    # The odd ones less clear than those beside them.
    found = told(own, said, seconds=13.0, size=size, less=1)
    assert [event[1] for event in found] == [round(start_s, 1) for start_s, _, _ in said]


def test_a_word_is_told_once_the_graph_and_the_pace_allow_it(info: KeywordInfo) -> None:
    said = [(1.0, 1.5, 0)]
    ((_, _, at_s),) = told(info, said, seconds=4.0, size=1_600)
    pace = Pace()
    assert at_s <= 1.5 + DELAY * HOP / SAMPLE_RATE_HZ + pace.settle_s + pace.hop_s + 0.1


def test_a_word_at_the_very_end_is_told_when_the_stream_ends(info: KeywordInfo) -> None:
    assert [event[:2] for event in told(info, [(1.8, 2.0, 2)], seconds=2.0, size=4_000)] == [
        (info.labels[2].label, 1.8)
    ]


def test_nothing_is_said_to_last_longer_than_the_stream(info: KeywordInfo) -> None:
    stream = stream_of(info)
    events = []
    samples = np.zeros(SAMPLE_RATE_HZ + 10, np.float32)
    for piece in [*stream.push(samples)]:
        events += stream.settle(piece, *computed(stream.chunk(piece), [(0.5, 9.0, 0)]))
    for piece in stream.flush():
        assert piece.length == len(samples)
        events += stream.settle(piece, *computed(stream.chunk(piece), [(0.5, 9.0, 0)]))
    assert [event.keyword for event in events] == [info.labels[0].label]
    assert all(event.end_s <= len(samples) / SAMPLE_RATE_HZ for event in events)


def test_a_stream_of_less_than_the_shortest_clip_is_nothing(info: KeywordInfo) -> None:
    stream = stream_of(info)
    assert list(stream.push(np.zeros(1_000, np.float32))) == []
    assert list(stream.flush()) == []


def test_every_sample_is_given_once_and_in_order(info: KeywordInfo) -> None:
    stream = stream_of(info)
    samples = np.arange(1, 100_001, dtype=np.float32)
    pieces = []
    for start in range(0, len(samples), 7_777):
        pieces += list(stream.push(samples[start : start + 7_777]))
    assert all(piece.length == ENDLESS for piece in pieces)
    pieces += list(stream.flush())
    assert all(len(piece.samples) % HOP == 0 for piece in pieces)
    assert all(len(piece.samples) <= MOST_FRAMES * HOP for piece in pieces)
    given = np.concatenate([piece.samples for piece in pieces])
    assert np.array_equal(given[: len(samples)], samples)
    assert not given[len(samples) :].any()
    assert len(given) >= len(samples) + DELAY * HOP


def test_memory_is_bounded(info: KeywordInfo) -> None:
    stream = stream_of(info)
    for _ in range(200):
        for piece in stream.push(np.zeros(SAMPLE_RATE_HZ, np.float32)):
            stream.settle(piece, *computed(stream.chunk(piece), [(0.0, 1e9, 0)]))
    kept = sum(len(logits) for logits, _ in stream._logits)
    # The oldest lot is kept whole.
    assert kept == stream._kept
    assert stream._keep <= kept < stream._keep + stream._frames
    assert stream._keep == info.window_s * SAMPLE_RATE_HZ / HOP
    assert sum(len(part) for part in stream._waiting._parts) <= Pace().hop_s * SAMPLE_RATE_HZ
    assert len(stream._spotter._told) == 1


@pytest.mark.parametrize("seed", range(20))
def test_what_each_lot_could_hold_tells_as_much_as_the_whole_stretch(
    info: KeywordInfo, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at a stream of scattered words and silence is that at all of its newest frames."""
    rng = np.random.default_rng(seed)
    stream, whole = stream_of(info), Spotter(info, Pace(), allowed_labels(info, []), 0.5)
    logits = rng.normal(0, 1, (200, 1 + WORDS)).astype(np.float32)
    logits[:, 0] += 14
    for frame in rng.choice(len(logits), 4, replace=False):
        logits[frame : frame + 6, 1 + rng.integers(WORDS)] += 16
    looks: list[tuple[Span, Array, list[Detection]]] = []
    masks: list[bool] = []

    def settle(span: Span, own: Array, likely: npt.NDArray[np.bool_] | None) -> list[Detection]:
        found = Spotter.settle(stream._spotter, span, own, likely)
        masks.append(likely is not None and not likely.all())
        looks.append((span, own, found))
        return found

    monkeypatch.setattr(stream._spotter, "settle", settle)
    # Lots that do not make up the stretch: its first one is cut.
    for end in range(3, len(logits) + 1, 3):
        found = stream._look(logits[end - 3 : end], last=False)
        newest = logits[max(0, end - stream._keep) : end]
        span, _, told = looks[-1]
        assert round((span.end_s - span.start_s) * SAMPLE_RATE_HZ / HOP) == len(newest)
        assert found == told == whole.settle(span, newest, np.ones(WORDS, dtype=bool))
    assert any(found for _, _, found in looks)
    assert any(masks)
    assert not all(masks)


def test_logits_that_say_nothing_are_likely_nothing(info: KeywordInfo) -> None:
    spotter = Spotter(info, Pace(), allowed_labels(info, []), 0.5)
    quiet = np.full((5, 1 + WORDS), -6.0, np.float32)
    quiet[:, 0] = 6.0
    assert spotter.likely(quiet) is None
    quiet[2, 1] = np.nan
    assert spotter.likely(quiet) is not None
