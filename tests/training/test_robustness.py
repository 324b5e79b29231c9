"""The grid of noises and rooms: what is sent, which conditions there are, and the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.conftest import SAMPLE_RATE_HZ, Samples, voice
from tests.training.fakes import FakeClient, make_clip
from tests.training.made_data import write_wav
from training.errors import MeasurementError
from training.evaluation.client import Upload
from training.evaluation.recordings import disturbed
from training.evaluation.report import Figure, Report
from training.evaluation.robust import (
    conditions,
    evaluate_robustness,
    robustness_table,
    write_robustness_page,
)
from training.manifest import Data, Recording


def heard(upload: Upload) -> Samples:
    samples, rate_hz = soundfile.read(io.BytesIO(upload.data), dtype="float32")
    assert rate_hz == SAMPLE_RATE_HZ
    return np.asarray(samples)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Four people with eight clips each of an Arabic word, a noise and a room, all of dev."""
    rng = np.random.default_rng(0)
    clips = []
    for person in "abcd":
        for take in range(8):
            clip = make_clip(
                tmp_path, f"{person}/{take}", corpus="asc", language="ar", keyword="one", speaker=f"asc-{person}"
            )
            write_wav(clip.path, (0.2 * voice(1.0)).astype(np.float32))
            clips.append(clip)
    sounds = {"noise": 0.1 * rng.standard_normal(30_000), "room": np.r_[np.zeros(40), 0.9, np.zeros(2000), 0.4]}
    found = {}
    for name, samples in sounds.items():
        write_wav(tmp_path / f"{name}.wav", samples.astype(np.float32))
        found[name] = Recording(tmp_path / f"{name}.wav", name, "made", "dev", name, 1.0)
    return Data(tmp_path, tuple(clips), (found["noise"],), (found["room"],))


@pytest.mark.parametrize("snr_db", [20.0, 5.0, 0.0])
@pytest.mark.parametrize("rooms", [(), (np.r_[np.zeros(40), 1.0, np.zeros(999), 0.5].astype(np.float32),)])
def test_noise_has_its_level_below_what_the_room_made_of_the_speech(
    data: Data, snr_db: float, rooms: tuple[Samples, ...]
) -> None:
    clip = data.clips[0]
    quiet = heard(disturbed(clip, data.noises, None, rooms))
    noise = heard(disturbed(clip, data.noises, snr_db, rooms)) - quiet
    # Pauses of the recording do not count; in a room there are none.
    spoken = quiet if rooms else quiet[quiet != 0]
    found = 10 * np.log10(np.square(spoken).mean() / np.square(noise).mean())
    assert found == pytest.approx(snr_db, abs=0.1)


def test_a_noise_s_pauses_are_not_made_loud(data: Data, tmp_path: Path) -> None:
    """A tenth of a second of noise in five of next to nothing."""
    rng = np.random.default_rng(1)
    sneeze = 1e-5 * rng.standard_normal(80_000)
    sneeze[40_000:41_600] += 0.3 * rng.standard_normal(1600)
    write_wav(tmp_path / "sneeze.wav", sneeze.astype(np.float32))
    noises = [Recording(tmp_path / "sneeze.wav", "sneeze", "made", "dev", "sneeze", 5.0)]
    for clip in data.clips:
        added = heard(disturbed(clip, noises, 10.0)) - heard(disturbed(clip, noises, None))
        assert np.abs(added).max() > 10 * np.median(np.abs(added))


def test_a_clip_meets_the_same_noise_and_room_every_time(data: Data) -> None:
    rooms = [np.r_[np.zeros(40), 1.0, np.zeros(100 * number), 0.5].astype(np.float32) for number in range(8)]
    once, twice = (disturbed(data.clips[0], data.noises, 5.0, rooms) for _ in range(2))
    assert once == twice
    told_apart = {disturbed(clip, data.noises, None, rooms).data for clip in data.clips}
    assert len(told_apart) > 3


def test_the_grid_has_every_level_dry_and_reverberant_and_known_reverberation_times(data: Data) -> None:
    found = conditions(data, "dev")
    names = [condition.name for condition in found]
    assert len(set(names)) == 13
    assert {f"{place}, {level}" for place in ("dry", "reverberant") for level in ("20 dB", "0 dB")} <= set(names)
    assert [name for name in names if name.startswith("T60")] == sorted(name for name in names if "T60" in name)
    assert {len(condition.rooms) for condition in found if condition.place == "reverberant"} == {4}
    assert {len(condition.rooms) for condition in found if condition.place == "dry"} == {0}


class Listener(FakeClient):
    """Hears the word in everything, and takes everybody for everybody."""

    def __init__(self) -> None:
        super().__init__(labels=["ar:one"])
        self.sent: list[bytes] = []

    def detect(self, upload: Upload, **_: Any) -> dict[str, Any]:
        self.sent.append(upload.data)
        return {"top": [{"keyword": "ar:one"}]}

    def enrol(self, speaker_id: str, uploads: Any) -> dict[str, Any]:
        self.profiles[speaker_id] = [str(len(upload.data)) for upload in uploads]
        return {"status": "enrolled", "clips": [{"accepted": True} for _ in uploads]}

    def compare(self, _upload: Upload, speaker_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {speaker_id: {"score": 1.0, "cosine": 1.0} for speaker_id in speaker_ids}


def test_both_tasks_are_measured_under_every_condition(data: Data) -> None:
    client: Any = Listener()
    report = evaluate_robustness(client, data, split="dev", command="sotto evaluate", say=lambda _: None)
    assert len(report.figures) == 2 * 13
    assert report.value("asc top-1, dry, no noise") == 100.0
    assert report.value("sv EER, reverberant, 0 dB") == pytest.approx(50.0)
    assert client.profiles == {}


def test_what_is_sent_differs_with_the_condition(data: Data) -> None:
    client: Any = Listener()
    evaluate_robustness(client, data, split="dev", command="", say=lambda _: None)
    # Everybody says the same here, so without noise there is one clip for each of four rooms, and a dry one.
    assert len(client.sent) == 13 * 32
    assert len(set(client.sent)) == 8 * 32 + 4 + 1


def test_a_condition_that_does_not_exist_is_named(data: Data) -> None:
    client: Any = Listener()
    with pytest.raises(MeasurementError, match="no condition wet, 7 dB"):
        evaluate_robustness(client, data, split="dev", command="", say=lambda _: None, only=("wet, 7 dB",))


def test_a_split_without_noise_is_refused(data: Data) -> None:
    client: Any = FakeClient()
    with pytest.raises(MeasurementError, match="no noise of the train split"):
        evaluate_robustness(client, data, split="train", command="", say=lambda _: None)


def test_the_page_has_the_grid_and_its_picture(tmp_path: Path) -> None:
    figures = [
        Figure("asc top-1, dry, no noise", 99.0, "%"),
        Figure("asc top-1, dry, 10 dB", 97.5, "%"),
        Figure("asc top-1, T60 0.31 s, no noise", 98.0, "%"),
        Figure("sv EER, dry, no noise", 5.0, "%"),
    ]
    report = Report("made@1", "dev", "sotto evaluate made --robust", figures)
    lines = robustness_table(report)
    assert lines[2] == "| dry | 99.00 | - | 97.50 | - | - |"
    assert lines[3] == "| T60 0.31 s | 98.00 | - | - | - | - |"
    assert lines[-1] == "| dry | 5.00 | - | - | - | - |"
    write_robustness_page(report, tmp_path / "out/page.md")
    text = (tmp_path / "out/page.md").read_text()
    assert "sotto evaluate made --robust" in text
    assert (tmp_path / "out/page.png").read_bytes().startswith(b"\x89PNG")
