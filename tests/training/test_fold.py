"""The calibration fold: which training speakers are set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.manifest import CALIBRATION_FOLD, Clip, assign_fold


def clips_of(speakers: int, *, corpus: str = "c", split: str = "train", each: int = 3) -> list[Clip]:
    """`each` clips of speakers named by corpus, split and number."""
    return [
        spoken(f"{corpus}-{split}-{number}", take, corpus, split) for number in range(speakers) for take in range(each)
    ]


def spoken(speaker: str, take: int, corpus: str = "c", split: str = "train") -> Clip:
    key = f"{corpus}/{speaker}/{take}.wav"
    return Clip(Path(key), key, corpus, split, speaker, "yes", "yes", "en", 1.0)


def held(clips: list[Clip], *, fraction: float = 0.25, seed: int = 3) -> set[str]:
    """Speakers with a clip in the fold."""
    folded = assign_fold(clips, fraction=fraction, seed=seed)
    return {clip.speaker for clip in folded if clip.split == CALIBRATION_FOLD}


def test_whole_speakers_move() -> None:
    folded = assign_fold(clips_of(20), fraction=0.25, seed=3)
    splits = {speaker: {clip.split for clip in folded if clip.speaker == speaker} for speaker in held(clips_of(20))}
    assert len(splits) == 5
    assert all(names == {CALIBRATION_FOLD} for names in splits.values())


def test_order_and_everything_else_is_kept() -> None:
    clips = clips_of(20)
    assert [clip.key for clip in assign_fold(clips, fraction=0.25, seed=3)] == [clip.key for clip in clips]


def test_nobody_moves_out_of_dev() -> None:
    folded = assign_fold(clips_of(20, split="dev"), fraction=0.5, seed=3)
    assert {clip.split for clip in folded} == {"dev"}


def test_choice_is_the_same_every_time_and_in_every_order() -> None:
    assert held(clips_of(20)) == held(clips_of(20)[::-1])


def test_another_seed_chooses_others() -> None:
    assert held(clips_of(40), seed=3) != held(clips_of(40), seed=4)


@pytest.mark.parametrize("number", range(20))
def test_new_speaker_trades_places_with_one_other_at_most(number: int) -> None:
    before = clips_of(20)
    after = [*before, spoken(f"new-{number}", 0)]
    assert len((held(before) ^ held(after)) - {f"new-{number}"}) <= 1


def test_small_corpus_keeps_its_speakers() -> None:
    assert held(clips_of(7), fraction=0.5) == set()


def test_two_speakers_move_at_least() -> None:
    assert len(held(clips_of(8), fraction=0.01)) == 2


def test_corpora_choose_for_themselves() -> None:
    both = held([*clips_of(20), *clips_of(8, corpus="d")])
    assert both == held(clips_of(20)) | held(clips_of(8, corpus="d"))


def test_clips_without_a_speaker_move_one_by_one() -> None:
    clips = [spoken("", take) for take in range(2000)]
    moved = sum(clip.split == CALIBRATION_FOLD for clip in assign_fold(clips, fraction=0.25, seed=3))
    # Binomial: 500 on average, deviation 19.
    assert 420 < moved < 580
