"""A clip's outputs do not depend on what it is batched with: checked for every built-in bundle."""

from __future__ import annotations

import numpy as np
import pytest

from model_store import LocalStore, builtin_store_path
from service.audio import Waveform
from service.engine import PARTS, Engine, Outputs, Part
from tests.conftest import references, voice

STORE = LocalStore(builtin_store_path())
BUNDLES = references(STORE)
TOLERANCE = 1e-4
NEIGHBOURS = {
    "loud": lambda: np.clip(voice(1.0, seed=1, level=5.0), -1, 1),
    "silent": lambda: np.zeros(16_000, np.float32),
    "long": lambda: voice(9.0, seed=2),
    "short": lambda: voice(0.1, seed=3),
    # What decoding refuses; should it ever come this far, it stays with who sent it.
    "NaN": lambda: np.full(24_000, np.nan, np.float32),
    "NaN, short": lambda: np.full(3_000, np.nan, np.float32),
    "noise": lambda: np.random.default_rng(4).uniform(-1, 1, 24_000).astype(np.float32),
}


@pytest.fixture(scope="module", params=BUNDLES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(STORE.resolve(request.param), intra_op_threads=1)


def worst_difference(one: Outputs, other: Outputs) -> float:
    assert one.arrays.keys() == other.arrays.keys()
    pairs = [(values, other.arrays[name]) for name, values in one.arrays.items()]
    assert all(left.shape == right.shape for left, right in pairs)
    # Of numpy, which lets no NaN pass.
    return float(np.max([np.abs(left - right).max() for left, right in pairs]))


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_alone_and_beside_a_neighbour_are_the_same(engine: Engine, neighbour: str) -> None:
    clip = Waveform(voice(1.3))
    (alone,) = engine.run([clip])
    together = engine.run([clip, Waveform(NEIGHBOURS[neighbour]())])[0]
    assert worst_difference(alone, together) < TOLERANCE


@pytest.mark.parametrize("samples", [1_600, 1_601, 15_999, 16_000, 16_001, 40_000])
def test_any_length_gives_the_same_alone_and_padded(engine: Engine, samples: int) -> None:
    clip = Waveform(voice(3.0)[:samples])
    (alone,) = engine.run([clip])
    padded = engine.run([Waveform(voice(4.0, seed=9)), clip])[1]
    assert worst_difference(alone, padded) < TOLERANCE


@pytest.mark.parametrize("part", ["keywords", "speaker"])
def test_a_part_of_the_graph_gives_what_all_of_it_does(engine: Engine, part: Part) -> None:
    clips = [Waveform(voice(1.3)), Waveform(voice(2.0, seed=5))]
    if engine.manifest.speaker is None and part == "speaker":
        with pytest.raises(KeyError):
            engine.run(clips, part)
        return
    for whole, own in zip(engine.run(clips), engine.run(clips, part), strict=True):
        for name in PARTS[part]:
            assert float(np.abs(whole.arrays[name] - own.arrays[name]).max()) < TOLERANCE
        with pytest.raises(KeyError):
            _ = own.frames


def test_embeddings_have_unit_length(engine: Engine) -> None:
    (outputs,) = engine.run([Waveform(voice(1.0))])
    assert np.linalg.norm(outputs.embedding) == pytest.approx(1.0, abs=1e-5)
    if engine.manifest.speaker is not None:
        assert np.linalg.norm(outputs.speaker_embedding) == pytest.approx(1.0, abs=1e-5)


def test_there_is_a_built_in_bundle_to_check() -> None:
    assert "sotto-edge" in STORE.names()
