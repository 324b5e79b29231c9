"""Wake words: thresholds at a rate of false alarms, and PocketSphinx held to the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.fakes import FakeClient, make_clip
from tests.training.made_data import write_wav
from training.errors import MeasurementError
from training.evaluation.peers import pocketsphinx_found
from training.evaluation.report import evaluate
from training.evaluation.wake import WakeMisses, listen, wake_audio, wake_misses, wake_shipped
from training.manifest import Data, Recording


def events(*scores: float, word: str = "en:alexa") -> dict[str, Any]:
    return {"detections": [{"keyword": word, "score": score} for score in scores]}


def wake_data(folder: Path, *, hours: float, transcript: str = "") -> Data:
    """Four clips of "alexa" and one of other speech that lasts `hours`."""
    words = [make_clip(folder, f"wake{n}", corpus="pvwake", keyword="alexa", transcript="alexa") for n in range(4)]
    speech = make_clip(folder, "speech", corpus="other", transcript=transcript, duration_s=hours * 3600)
    return Data(folder, (*words, speech), (), ())


def missed_words(client: Any, data: Data, *, per_hour: float) -> WakeMisses:
    plan = wake_audio(data, "dev")
    return wake_misses(plan, listen(client, plan), per_hour=per_hour)


WAKE_ANSWERS = {
    "wake0": events(0.95),
    "wake1": events(0.70, 0.30),
    "wake2": events(0.50),
    "wake3": events(),
    "speech": events(0.9, 0.6, 0.4, 0.2),
}


@pytest.mark.parametrize(
    ("hours", "per_hour", "missed"),
    [
        # No alarm allowed: above 0.9. One: above 0.6. Two: above 0.4. Ten: everything found counts.
        (0.5, 1.0, 3),
        (1.0, 1.0, 2),
        (2.0, 1.0, 1),
        (1.0, 2.0, 1),
        (1.0, 10.0, 1),
    ],
)
def test_wake_threshold_is_where_the_allowed_alarms_are(
    tmp_path: Path, hours: float, per_hour: float, missed: int
) -> None:
    client: Any = FakeClient(WAKE_ANSWERS)
    found = missed_words(client, wake_data(tmp_path, hours=hours), per_hour=per_hour)
    assert (found.misses.hits, found.misses.total) == (missed, 4)
    assert found.negative_hours == pytest.approx(hours)


def test_sentence_that_holds_the_word_raises_no_alarm(tmp_path: Path) -> None:
    client: Any = FakeClient(WAKE_ANSWERS)
    found = missed_words(client, wake_data(tmp_path, hours=1.0, transcript="say Alexa now"), per_hour=0.1)
    assert found.misses.hits == 1
    assert found.negative_hours == 0


def test_thresholds_that_ship_are_taken_as_they_are(tmp_path: Path) -> None:
    client: Any = FakeClient(WAKE_ANSWERS)
    plan = wake_audio(wake_data(tmp_path, hours=2.0), "dev")
    heard = listen(client, plan)
    misses, alarms_per_hour = wake_shipped(plan, heard, {"en:alexa": 0.6})
    # Of 0.95, 0.70, 0.50 and nothing, two pass; of 0.9, 0.6, 0.4 and 0.2 in two hours of other speech, two.
    assert (misses.misses.hits, misses.misses.total) == (2, 4)
    assert alarms_per_hour == pytest.approx(1.0)


def test_wake_asks_for_the_wake_words_only(tmp_path: Path) -> None:
    client: Any = FakeClient(WAKE_ANSWERS)
    missed_words(client, wake_data(tmp_path, hours=1.0), per_hour=1.0)
    assert all(query["keywords"] == ["en:alexa"] for query in client.queries)


def test_other_wake_words_are_other_audio(tmp_path: Path) -> None:
    data = wake_data(tmp_path, hours=1.0)
    other = make_clip(tmp_path, "other", corpus="pvwake", keyword="jarvis", transcript="jarvis", duration_s=3600)
    client: Any = FakeClient({**WAKE_ANSWERS, "other": events(0.8, 0.75)})
    found = missed_words(client, Data(tmp_path, (*data.clips, other), (), ()), per_hour=1.0)
    # Alarms 0.9, 0.8 in two hours are allowed, so 0.75 is the first that is not.
    assert found.by_word["en:alexa"].hits == 3
    assert found.by_word["en:jarvis"].hits == 1


# Hears "alexa" in whatever is loud, in three samples as surely as they are.
POCKETSPHINX = """
import collections, numpy
Segment = collections.namedtuple("Segment", "word prob")
class Decoder:
    def __init__(self, **options): self.words, self.peak = "", 0.0
    def lookup_word(self, word): return None if word == "snowboy" else word
    def add_word(self, word, phones, update): assert phones == "S N OW B OY"
    def add_kws(self, name, path): self.words = open(path).read()
    def activate_search(self, name): assert "snowboy /1e-50/" in self.words and "alexa /1e-50/" in self.words
    def start_utt(self): pass
    def process_raw(self, data, no_search, full_utt): self.peak = numpy.abs(numpy.frombuffer(data, "<i2")).max() / 32767
    def end_utt(self): pass
    def hyp(self): return "alexa" if self.peak > 0.1 else None
    def seg(self): return [Segment("alexa ", round(float(self.peak), 2))]
"""


def test_pocketsphinx_is_given_what_the_service_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pocketsphinx.py").write_text(POCKETSPHINX)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    clips = []
    for number, (word, level) in enumerate((("alexa", 0.5), ("alexa", 0.01), ("snowboy", 0.25))):
        clips.append(make_clip(tmp_path, f"wake{number}", corpus="pvwake", keyword=word, duration_s=3600.0))
        write_wav(clips[-1].path, np.full(1600, level, dtype=np.float32))
    plan = wake_audio(Data(tmp_path, tuple(clips), (), ()), "dev")
    found = pocketsphinx_found(plan, Path(sys.executable))
    assert found == [{"en:alexa": [0.5]}, {}, {"en:alexa": [0.25]}]
    misses = wake_misses(plan, found, per_hour=1.0, least=0.0)
    assert {word: (rate.hits, rate.total) for word, rate in misses.by_word.items()} == {
        "en:alexa": (1, 2),
        "en:snowboy": (1, 1),
    }


def test_a_word_that_pocketsphinx_cannot_pronounce_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pocketsphinx.py").write_text(POCKETSPHINX.replace('"snowboy" else', '"alexa" else'))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    clip = make_clip(tmp_path, "wake", corpus="pvwake", keyword="alexa")
    with pytest.raises(MeasurementError, match="how 'alexa' is pronounced"):
        pocketsphinx_found(wake_audio(Data(tmp_path, (clip,), (), ()), "dev"), Path(sys.executable))


def test_the_row_says_what_it_was_held_to_and_which_peer_is_missing(tmp_path: Path) -> None:
    data = wake_data(tmp_path, hours=2.0)
    for clip in data.clips:
        write_wav(clip.path, np.zeros(1600, dtype=np.float32))
    noise = Recording(data.clips[0].path, "noise", "made", "dev", "noise", 1.0)
    client: Any = FakeClient()
    client.detect = lambda _upload, **_query: events(0.9)
    said: list[str] = []
    report = evaluate(
        client, replace(data, noises=(noise,)), split="dev", rows=["wake"], bundle=None,
        peers_python=tmp_path / "python", command="", say=said.append,
    )  # fmt: skip
    # Everything sounds alike: two alarms in two hours let all be found, none lets nothing.
    assert {figure.name: figure.value for figure in report.figures} == {
        "wake miss at 1/h, clean": 0.0, "wake miss at no false alarm, clean": 100.0,
        "wake miss at 1/h, 10 dB": 0.0, "wake miss at no false alarm, 10 dB": 100.0,
        "wake miss at the thresholds that ship, clean": 0.0, "wake miss at the thresholds that ship, 10 dB": 0.0,
        "wake false alarms at the thresholds that ship, clean": pytest.approx(1.0, abs=1e-3),
        "wake false alarms at the thresholds that ship, 10 dB": pytest.approx(1.0, abs=1e-3),
    }  # fmt: skip
    assert [line for line in said if "PocketSphinx" in line] == [said[-1]]
    assert "make peers" in said[-1]


def test_peers_that_are_not_there_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="make peers"):
        pocketsphinx_found(wake_audio(Data(tmp_path, (), (), ()), "dev"), tmp_path / "python")
