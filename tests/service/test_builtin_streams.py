"""What a built-in bundle's streaming graph tells of people it never heard is what its clip graph tells."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from model_store import LocalStore, builtin_store_path
from service.audio import SAMPLE_RATE_HZ, Samples, Waveform
from service.engine import Engine
from service.keywords import Detection, detect, weigh
from service.streaming import FrameStream, Pace, Piece, Spotter
from tests.conftest import references
from training.audio_cache import decode
from training.evaluation.tasks import SPOT_CORPUS
from training.evaluation.wake import WAKE_CORPUS
from training.manifest import Clip, read_data

STORE = LocalStore(builtin_store_path())
BUNDLES = [reference for reference in references(STORE) if STORE.resolve(reference).manifest.stream is not None]
# A quarter of a second at a time, as a browser sends it.
MESSAGE = SAMPLE_RATE_HZ // 4
# A stream decides before it has heard the rest: now and then that would have changed its mind.
DIFFERENT = 0.05
TOLERANCE_S = 0.1


def of_clip(engine: Engine, samples: Samples) -> list[Detection]:
    info = engine.manifest.keywords
    logits = engine.run([Waveform(samples)], "keywords")[0].keyword_logits
    duration_s = len(samples) / SAMPLE_RATE_HZ
    return detect(weigh(logits, info), info, duration_s, engine.every_keyword, engine.thresholds)


def of_stream(engine: Engine, samples: Samples) -> list[Detection]:
    manifest, graph = engine.manifest, engine.streaming
    assert graph is not None
    spotter = Spotter(manifest.keywords, Pace(), engine.every_keyword, None)
    stream = FrameStream(manifest.keywords, Pace(), spotter, graph, shortest_s=manifest.audio.shortest_s)
    events: list[Detection] = []

    def hear(pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            ((logits, progress),) = graph.run([stream.chunk(piece)])
            events.extend(stream.settle(piece, logits, progress))

    for start in range(0, len(samples), MESSAGE):
        hear(stream.push(samples[start : start + MESSAGE]))
    hear(stream.flush())
    return events


def unmatched(wanted: list[Detection], found: list[Detection]) -> int:
    """Events of one that the other lacks, both ways."""
    rest, missing = list(found), 0
    for event in wanted:
        same = [other for other in rest if other.keyword == event.keyword and overlap(event, other)]
        missing += not same
        rest = [other for other in rest if other not in same[:1]]
    return missing + len(rest)


def overlap(one: Detection, other: Detection) -> bool:
    return one.start_s < other.end_s + TOLERANCE_S and other.start_s < one.end_s + TOLERANCE_S


def chosen(clips: list[Clip], corpus: str) -> list[Clip]:
    return [clip for clip in clips if clip.corpus == corpus and (corpus != SPOT_CORPUS or "sentence" in clip.key)]


@pytest.mark.parametrize("corpus", [SPOT_CORPUS, WAKE_CORPUS])
@pytest.mark.parametrize("reference", BUNDLES)
def test_detections_are_those_of_the_clip_graph(reference: str, corpus: str, shared_data: Path) -> None:
    engine = Engine(STORE.resolve(reference), intra_op_threads=1)
    total = different = 0
    for clip in chosen(read_data(shared_data).split("dev"), corpus):
        samples = decode(clip.path)
        whole = of_clip(engine, samples)
        total += len(whole)
        different += unmatched(whole, of_stream(engine, samples))
    print(f"{reference}, {corpus}: {different} of {total} events differ")  # noqa: T201  for docs/results/release.md, with pytest -s
    assert total > 200
    assert different <= DIFFERENT * total, f"{different} of {total}"
