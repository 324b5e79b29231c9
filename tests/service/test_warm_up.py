"""What runs before the first caller comes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from model_store import LocalStore
from model_store.streaming import Chunk, StreamingGraph
from service.engine import WARM_UP_FRAMES, Engine


def test_streams_are_warmed_alone_and_in_the_largest_batch(
    builtin_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(builtin_store.resolve("sotto-edge"), intra_op_threads=1)
    assert engine.streaming is not None
    run, ran = StreamingGraph.run, set()

    def watched(self: StreamingGraph, chunks: Sequence[Chunk]) -> object:
        ran.add((len(chunks[0].samples) // self.hop, len(chunks)))
        return run(self, chunks)

    monkeypatch.setattr(StreamingGraph, "run", watched)
    engine.warm_up(8)
    assert ran == {(frames, count) for frames in WARM_UP_FRAMES for count in (1, 8)}
