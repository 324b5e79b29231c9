"""The recognition rows, with a service that answers from a table."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.training.fakes import FakeClient, make_clip
from tests.training.made_data import write_table
from training.errors import ManifestError
from training.evaluation.recordings import beginning
from training.evaluation.report import default_rows, evaluate
from training.evaluation.tasks import (
    Trials,
    clip_accuracy,
    listed_trials,
    plan_trials,
    run_trials,
    spot_misses,
    verification,
)
from training.manifest import COLUMNS, PEOPLE_COLUMNS, Clip, Data, read_data, read_trials


def top(label: str) -> dict[str, Any]:
    return {"top": [{"keyword": label, "score": 0.9}]}


def test_clip_accuracy_counts_overall_by_corpus_and_by_speaker(tmp_path: Path) -> None:
    clips = [
        make_clip(tmp_path, "a", corpus="x", speaker="ann", keyword="yes"),
        make_clip(tmp_path, "b", corpus="x", speaker="bob", keyword="yes"),
        make_clip(tmp_path, "c", corpus="y", keyword="no"),
    ]
    client: Any = FakeClient({"a": top("en:yes"), "b": top("en:no"), "c": top("en:no")}, ["en:yes", "en:no"])
    found = clip_accuracy(client, clips)
    assert (found.overall.hits, found.overall.total) == (2, 3)
    assert {name: rate.value for name, rate in found.by_corpus.items()} == {"x": 0.5, "y": 1.0}
    assert {name: rate.value for name, rate in found.by_speaker.items()} == {"ann": 1.0, "bob": 0.0, "?": 1.0}
    assert found.confusions == [("en:yes", "en:no", 1)]


def test_clip_accuracy_leaves_out_words_the_model_does_not_have(tmp_path: Path) -> None:
    clips = [
        make_clip(tmp_path, "a", keyword="yes"),
        make_clip(tmp_path, "b", keyword="maybe"),
        make_clip(tmp_path, "c"),
    ]
    client: Any = FakeClient({"a": top("en:yes")}, ["en:yes"])
    assert clip_accuracy(client, clips).overall.total == 1


def test_clip_accuracy_does_not_ask_again_for_what_was_heard(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path, "a", keyword="yes"), make_clip(tmp_path, "b", keyword="no")]
    client: Any = FakeClient({"a": top("en:yes"), "b": top("en:yes")}, ["en:yes", "en:no"])
    heard: dict[str, str] = {}
    clip_accuracy(client, clips[:1], heard=heard)
    found = clip_accuracy(client, clips, heard=heard)
    assert (found.overall.hits, found.overall.total, len(client.queries)) == (1, 2, 2)
    assert heard == {clips[0].key: "en:yes", clips[1].key: "en:yes"}


def sentence(folder: Path, key: str) -> Clip:
    clip = make_clip(folder, f"sentence/{key}", corpus="wuw2", keyword="operator", duration_s=1800.0)
    return Clip(**{name: getattr(clip, name) for name in Clip.__slots__} | {"word_start_s": 2.0, "word_end_s": 2.6})


def heard_at(centre_s: float, word: str = "en:operator") -> dict[str, Any]:
    event = {"keyword": word, "score": 0.9, "start_s": centre_s - 0.2, "end_s": centre_s + 0.2}
    return {"detections": [event]}


@pytest.mark.parametrize(
    ("centre_s", "missed"), [(1.49, 1), (1.51, 0), (2.3, 0), (3.09, 0), (3.11, 1)]
)  # fmt: skip
def test_spotted_word_counts_within_half_a_second_of_its_alignment(
    tmp_path: Path, centre_s: float, missed: int
) -> None:
    client: Any = FakeClient({"sentence/a": heard_at(centre_s)})
    assert spot_misses(client, [sentence(tmp_path, "a")]).misses.hits == missed


def test_wrong_word_is_a_miss_and_a_false_alarm(tmp_path: Path) -> None:
    client: Any = FakeClient({"sentence/a": heard_at(2.3, "en:wildfire")})
    found = spot_misses(client, [sentence(tmp_path, "a")])
    assert found.by_word["en:operator"].value == 1.0
    # One in half an hour.
    assert found.false_alarms_per_hour == 2.0


def test_spot_is_told_by_group_where_the_table_names_people(tmp_path: Path) -> None:
    """Six people, of whom the women are heard and the men are not."""
    names = [f"{gender}-{number}" for gender in ("female", "male") for number in range(3)]
    clips = [replace(sentence(tmp_path, name), speaker=name) for name in names]
    rows = [(name, "wuw2", "dev", "1", "5", name.split("-")[0], "", "") for name in names]
    write_table(tmp_path / "speakers.csv", PEOPLE_COLUMNS, rows)
    client: Any = FakeClient({clip.key: heard_at(2.3) for clip in clips[:3]})
    data = Data(tmp_path, tuple(clips), (), ())
    report = evaluate(
        client, data, split="dev", rows=["spot"], bundle=None, peers_python=tmp_path, command="", say=lambda _: None
    )
    assert report.value("spot miss") == 50.0
    assert report.value("spot miss, gender female") == 0.0
    assert report.value("spot miss, gender male") == 100.0
    assert "over 6 people" in report.figures[0].detail


def test_spot_leaves_out_clips_that_are_no_sentences(tmp_path: Path) -> None:
    client: Any = FakeClient()
    isolated = make_clip(tmp_path, "word/a", corpus="wuw2", keyword="operator")
    assert spot_misses(client, [isolated]).misses.total == 0


def people(folder: Path, corpus: str, clips_each: list[int]) -> list[Clip]:
    """Speakers a, b, ... of a corpus with so many clips."""
    return [
        make_clip(folder, f"{corpus}-{name}-{take}", corpus=corpus, speaker=f"{corpus}-{name}")
        for name, count in zip("abcdefgh", clips_each, strict=False)
        for take in range(count)
    ]


def test_six_clips_enrol_and_the_others_test(tmp_path: Path) -> None:
    (plan,) = plan_trials(people(tmp_path, "c", [9, 8, 8, 7]))
    assert [len(own) for own in plan.enrolments.values()] == [6, 6, 6, 6]
    assert len(plan.tests) == 3 + 2 + 2 + 1
    enrolled = {clip.key for own in plan.enrolments.values() for clip in own}
    assert not enrolled & {clip.key for _, clip in plan.tests}


def test_plan_does_not_depend_on_the_order_of_clips(tmp_path: Path) -> None:
    clips = people(tmp_path, "c", [9, 9, 9, 9])
    (one,), (two,) = plan_trials(clips), plan_trials(clips[::-1])
    assert (one.enrolments, one.tests) == (two.enrolments, two.tests)


def test_speakers_with_six_clips_or_fewer_are_left_out(tmp_path: Path) -> None:
    (plan,) = plan_trials(people(tmp_path, "c", [8, 8, 8, 8, 6]))
    assert plan.speakers == ["c-a", "c-b", "c-c", "c-d"]


def test_corpus_with_too_few_speakers_is_left_out(tmp_path: Path) -> None:
    clips = people(tmp_path, "c", [8, 8, 8])
    assert plan_trials(clips) == []
    assert len(plan_trials(clips, least_speakers=3)) == 1


def test_nobody_tests_more_than_sixty_times(tmp_path: Path) -> None:
    (plan,) = plan_trials(people(tmp_path, "c", [90, 7, 7, 7]))
    assert sum(speaker == "c-a" for speaker, _ in plan.tests) == 60


def test_impostors_come_from_the_same_corpus_only(tmp_path: Path) -> None:
    plans = plan_trials(people(tmp_path, "c", [8] * 4) + people(tmp_path, "d", [8] * 5))
    assert [plan.corpus for plan in plans] == ["c", "d"]
    assert all(name.startswith(plan.corpus) for plan in plans for name in plan.speakers)
    targets, impostors = plans[0].split(np.zeros((8, 4)))
    # Two tests of each of four people, against themselves and against three others.
    assert (len(targets), len(impostors)) == (8, 24)


def scored(folder: Path) -> tuple[Any, Trials]:
    """A plan whose targets score 3 and impostors -2, after it was run; one test has no speech."""
    (plan,) = plan_trials(people(folder, "c", [8] * 4))
    silent = plan.tests[0][1].key
    client: Any = FakeClient()

    def score(speaker_id: str, key: str) -> tuple[float, float] | None:
        if key == silent:
            return None
        return (3.0, 0.9) if speaker_id.endswith(key[:3]) else (-2.0, 0.1)

    client.score = score
    client.refused = {plan.enrolments["c-a"][0].key}
    run_trials(client, plan)
    return client, plan


def test_trials_fill_both_scores(tmp_path: Path) -> None:
    plan = scored(tmp_path)[1]
    targets, impostors = plan.split(plan.llr)
    assert sorted(targets) == [-50.0] + [3.0] * 7
    assert sorted(impostors) == [-50.0] * 3 + [-2.0] * 21
    assert sorted(plan.split(plan.cosine)[0]) == [-1.0] + [0.9] * 7


def test_refused_enrolment_clips_are_counted(tmp_path: Path) -> None:
    assert scored(tmp_path)[1].refused_clips == 1


def test_trials_leave_no_profile_behind(tmp_path: Path) -> None:
    assert scored(tmp_path)[0].profiles == {}


def test_claims_to_be_a_speaker_who_cannot_be_enrolled_are_turned_away(tmp_path: Path) -> None:
    (plan,) = plan_trials(people(tmp_path, "c", [8] * 4))
    client: Any = FakeClient()
    client.status = "enrolling"
    run_trials(client, plan)
    assert plan.unenrolled == set(plan.speakers)
    assert set(plan.llr.ravel()) == {-50.0}
    assert client.profiles == {}


def test_verification_pools_corpora_and_keeps_them_apart(tmp_path: Path) -> None:
    plans = plan_trials(people(tmp_path, "c", [7] * 4) + people(tmp_path, "d", [7] * 4))
    own = np.eye(4, dtype=bool)
    # In c everything is right; in d targets score what c's impostors do, impostors what c's targets do.
    right, wrong = np.where(own, 2.0, -2.0), np.where(own, -2.0, 2.0)
    found = verification(plans, [right, wrong])
    assert found.eer_by_corpus == {"c": 0.0, "d": 1.0}
    assert found.eer == 0.5
    assert (found.targets, found.impostors) == (8, 24)
    assert (found.false_rejects.value, found.false_accepts.value) == (0.5, 0.5)


def test_verification_accepts_from_a_ratio_of_zero(tmp_path: Path) -> None:
    plans = plan_trials(people(tmp_path, "c", [7] * 4))
    found = verification(plans, [np.zeros((4, 4))])
    assert (found.false_rejects.value, found.false_accepts.value) == (0.0, 1.0)
    assert found.cllr == pytest.approx(1.0)


ANGLES = {"ann-1": 0, "ann-2": 20, "bob-1": 90, "bob-2": 200}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Recordings of two people, and every pair of different recordings in `trials.csv`."""
    lines = [",".join(COLUMNS)]
    for name in ANGLES:
        # The length tells the client which one it was sent.
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(16_000 + ANGLES[name]), 16_000)
        lines.append(f"{name}.wav,made,dev,{name[:3]},,,en,1.0,CC0")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    pairs = [f"{int(a[:3] == b[:3])},{a}.wav,{b}.wav" for a, b in itertools.combinations(ANGLES, 2)]
    (tmp_path / "trials.csv").write_text("\n".join(["target,enrolment,test", *pairs]) + "\n")
    return tmp_path


def by_angle(data: bytes) -> list[float]:
    degrees = len(soundfile.read(io.BytesIO(data))[0]) - 16_000
    return [3 * float(np.cos(np.radians(degrees))), 3 * float(np.sin(np.radians(degrees)))]


def test_listed_pairs_are_scored_by_cosine(listed: Path) -> None:
    client: Any = FakeClient()
    client.embedding = by_angle
    found = listed_trials(client, read_trials(listed))
    assert sorted(found.targets) == pytest.approx([np.cos(np.radians(110)), np.cos(np.radians(20))])
    assert len(found.impostors) == 4
    assert max(found.impostors) == pytest.approx(np.cos(np.radians(70)))
    assert (found.recordings, found.unheard) == (4, 0)


def test_a_pair_without_speech_is_turned_away(listed: Path) -> None:
    client: Any = FakeClient()
    client.embedding = lambda data: None if by_angle(data)[1] == 0 else by_angle(data)
    found = listed_trials(client, read_trials(listed))
    assert sorted(found.targets)[0] == -1.0
    assert sorted(found.impostors)[:2] == [-1.0, -1.0]
    assert found.unheard == 1


def test_only_the_beginning_of_a_very_long_recording_is_sent(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(5 * 16_000), 16_000)
    assert len(soundfile.read(io.BytesIO(beginning(tmp_path / "long.wav", 2.0).data))[0]) == 2 * 16_000
    assert beginning(tmp_path / "long.wav", 5.0).data == (tmp_path / "long.wav").read_bytes()


def test_listed_pairs_are_measured_where_the_data_has_them(listed: Path) -> None:
    data = read_data(listed)
    assert "trials" in default_rows(data)
    client: Any = FakeClient()
    client.embedding = by_angle
    report = evaluate(
        client, data, split="dev", rows=["trials"], bundle=None, peers_python=Path("none"), command="", say=print
    )
    # Below one target and above one impostor of four: rates of 1/2 and 1/4 either way of the crossing.
    assert 25 <= report.value("trials EER") <= 50
    (listed / "trials.csv").unlink()
    assert "trials" not in default_rows(data)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["2,ann-1.wav,ann-2.wav"], r"trials\.csv:2: target is '2'"),
        (["1,ann-1.wav,cat.wav"], r"trials\.csv:2: cat\.wav does not exist"),
        (["1,ann-1.wav,ann-2.wav"], "pairs of one speaker and pairs of two"),
    ],
)
def test_a_wrong_list_of_pairs_is_refused(listed: Path, lines: list[str], message: str) -> None:
    (listed / "trials.csv").write_text("\n".join(["target,enrolment,test", *lines]) + "\n")
    with pytest.raises(ManifestError, match=message):
        read_trials(listed)
