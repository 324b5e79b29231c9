"""Simulated rooms: their reverberation, where the direct sound is, and that they are computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SAMPLE_RATE_HZ
from training import rooms
from training.audio_cache import decode
from training.augment import DIRECT_SOUND_SAMPLES, reverberate
from training.manifest import read_data
from training.rooms import Room, evaluation_rooms, simulate, simulated, with_rooms


@pytest.fixture(scope="module")
def few() -> dict[float, Room]:
    """By the reverberation time that was asked for."""
    return {wanted: simulate(np.random.default_rng(3), (wanted, wanted)) for wanted in (0.25, 0.5, 0.8)}


def test_rooms_reverberate_about_as_long_as_asked(few: dict[float, Room]) -> None:
    """Sabine's formula is an approximation, good to some tenths."""
    for wanted, room in few.items():
        assert room.t60_s == pytest.approx(wanted, rel=0.35)
    assert sorted(few, key=lambda wanted: few[wanted].t60_s) == sorted(few)


def test_responses_begin_before_the_direct_sound_and_peak_as_the_recorded_ones_do(few: dict[float, Room]) -> None:
    for room in few.values():
        response = np.abs(room.response)
        assert response.max() == pytest.approx(0.9)
        # Nothing but the ripple of the fractional delay comes before.
        arrival = int(np.argmax(response > 0.3 * response[: DIRECT_SOUND_SAMPLES + 20].max()))
        assert abs(arrival - DIRECT_SOUND_SAMPLES) <= 2


def test_what_is_said_stays_in_its_place(few: dict[float, Room]) -> None:
    speech = np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ).astype(np.float32)
    for room in few.values():
        heard = reverberate(speech, room.response)
        lags = np.arange(-80, 81)
        matches = [float(np.dot(np.roll(heard, -lag), speech)) for lag in lags]
        assert abs(lags[int(np.argmax(matches))]) <= 5


def test_a_room_is_its_generator_s() -> None:
    one, same, other = (simulate(np.random.default_rng(seed)).response for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert len(one) != len(other)


def test_no_room_that_is_measured_in_was_trained_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Even where a recipe has the seed of the other."""
    drawn: list[float] = []

    def noted(rng: np.random.Generator, *_: object) -> Room:
        drawn.append(rng.uniform())
        return Room(0.5, np.ones(10, dtype=np.float32))

    monkeypatch.setattr(rooms, "simulate", noted)
    evaluation_rooms((0.3, 0.6, 0.9))
    for seed in (0, 1, 20261121):
        simulated(tmp_path, 20, seed=seed)
    assert len(set(drawn)) == len(drawn) == 3 + 3 * 20


def test_rooms_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = simulated(tmp_path, 2, seed=5)
    assert len({room.path.read_bytes() for room in first}) == 2
    assert {room.split for room in first} == {"train"}
    assert first[0].duration_s == pytest.approx(len(decode(first[0].path)) / SAMPLE_RATE_HZ)
    monkeypatch.setattr(rooms, "simulate", None)
    assert simulated(tmp_path, 2, seed=5) == first


def test_a_killed_simulation_leaves_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rooms.soundfile, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            simulated(tmp_path, 1, seed=5)
    assert np.abs(decode(simulated(tmp_path, 1, seed=5)[0].path)).max() == pytest.approx(0.9, abs=1e-3)


def test_data_gets_rooms_of_its_training_split_only(made_data: Path, tmp_path: Path) -> None:
    data = read_data(made_data)
    more = with_rooms(data, 2, tmp_path, seed=1)
    assert more.rooms[: len(data.rooms)] == data.rooms
    assert [room.split for room in more.rooms[len(data.rooms) :]] == ["train", "train"]
    assert with_rooms(data, 0, tmp_path, seed=1) == data
