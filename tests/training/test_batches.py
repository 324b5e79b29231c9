"""Training batches: pure in (seed, step), words whole, targets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import SAMPLE_RATE_HZ, Samples
from training.audio_cache import AudioCache
from training.augment import AugmentRecipe
from training.batches import NO_SPEAKER, Batch, BatchSource, SamplingRecipe, batches, cores_for
from training.manifest import Clip, Data

UNTOUCHED = AugmentRecipe(speeds=(1.0,), p_noise=0, p_room=0, p_narrowband=0, p_telephone=0, level_dbfs=(-20.0, -20.0))
FASTER_AND_SLOWER = replace(UNTOUCHED, speeds=(0.9, 1.0, 1.1))
BURST_S = 0.3
BASE = Clip(Path(), "", "c", "train", "", "", "", "en", 0.0)


def burst_clip(name: str, seconds: float, start_s: float, **changes: object) -> tuple[Clip, Samples]:
    """Silence with a tone of BURST_S in it, aligned to the sample."""
    samples = np.zeros(round(seconds * SAMPLE_RATE_HZ), dtype=np.float32)
    first, count = round(start_s * SAMPLE_RATE_HZ), round(BURST_S * SAMPLE_RATE_HZ)
    samples[first : first + count] = 0.5 * np.sin(2 * np.pi * 800 * np.arange(count) / SAMPLE_RATE_HZ)
    clip = replace(BASE, path=Path(name), key=name, duration_s=seconds)
    if changes.get("keyword"):
        clip = replace(clip, word_start_s=start_s, word_end_s=start_s + BURST_S)
    return replace(clip, **changes), samples


def source_of(
    recordings: Sequence[tuple[Clip, Samples]],
    labels: Sequence[str] = ("en:yes",),
    *,
    seed: int = 1,
    augment: AugmentRecipe = UNTOUCHED,
    batch_size: int = 8,
    **sampling: object,
) -> BatchSource:
    ends = np.cumsum([len(samples) for _, samples in recordings])
    index = {str(clip.path): (int(end) - len(own), int(end)) for (clip, own), end in zip(recordings, ends, strict=True)}
    pcm = np.concatenate([samples for _, samples in recordings]) * 32767
    clips = [clip for clip, _ in recordings]
    recipe = SamplingRecipe(**{"crop_s": 1.0, "p_noise_only": 0.0, **sampling})
    return BatchSource(
        Data(Path(), tuple(clips), (), ()), clips, AudioCache(pcm.astype(np.int16), index), labels,
        batch_size=batch_size, seed=seed, sampling=recipe, augment=augment,
    )  # fmt: skip


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Without those that need a teacher."""
    named = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return {name: value for name, value in named.items() if value is not None}


def items(source: BatchSource, steps: int) -> list[Batch]:
    """Batches of one out of those of `steps` steps."""
    return [
        Batch(**{name: value[row] for name, value in tensors(batch).items()})
        for batch in (source[step] for step in range(steps))
        for row in range(len(batch.lengths))
    ]


def heard_s(waveform: torch.Tensor) -> tuple[float, float]:
    """First and last instant of the tone."""
    loud = np.flatnonzero(np.abs(waveform.numpy()) > 0.2 * float(waveform.abs().max()))
    return loud[0] / SAMPLE_RATE_HZ, (loud[-1] + 1) / SAMPLE_RATE_HZ


def assert_equal(one: Batch, two: Batch) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.fixture
def varied() -> list[tuple[Clip, Samples]]:
    """A long keyword clip, a short one, and a sentence; two speakers."""
    return [
        burst_clip("long", 4.0, 1.9, keyword="yes", speaker="ann"),
        burst_clip("short", 0.5, 0.1, keyword="yes", speaker="bob"),
        burst_clip("other", 3.0, 1.0, transcript="nothing"),
    ]


def test_step_gives_the_same_batch_whatever_came_before(varied: list[tuple[Clip, Samples]]) -> None:
    first, second = (source_of(varied, augment=AugmentRecipe(), p_noise_only=0.2) for _ in range(2))
    for step in (0, 1, 2):
        first[step]
    assert_equal(first[7], second[7])


def test_worker_process_gives_the_same_batches(varied: list[tuple[Clip, Samples]]) -> None:
    source = source_of(varied, augment=AugmentRecipe())
    for step, batch in enumerate(batches(source, 5, 8, workers=1), start=5):
        assert_equal(batch, source[step])


def test_steps_and_seeds_differ(varied: list[tuple[Clip, Samples]]) -> None:
    source, other = source_of(varied, seed=1), source_of(varied, seed=2)
    assert not torch.equal(source[0].waveform, source[1].waveform)
    assert not torch.equal(source[0].waveform, other[0].waveform)


@pytest.mark.parametrize(("seconds", "start_s"), [(4.0, 1.9), (4.0, 0.0), (4.0, 3.7), (1.2, 0.5), (0.5, 0.1)])
def test_keyword_is_whole_in_the_crop_where_its_interval_says(seconds: float, start_s: float) -> None:
    source = source_of([burst_clip("a", seconds, start_s, keyword="yes")], augment=FASTER_AND_SLOWER)
    spoken = [item for item in items(source, 12) if item.keyword == 1]
    assert len(spoken) > 30
    for item in spoken:
        assert heard_s(item.waveform) == pytest.approx(item.word_s.tolist(), abs=0.003)
        assert float(item.word_s[1] - item.word_s[0]) == pytest.approx(BURST_S, rel=0.12)


def test_crop_without_the_keyword_is_background() -> None:
    source = source_of([burst_clip("a", 4.0, 1.9, keyword="yes")])
    absent = [item for item in items(source, 25) if item.keyword == 0]
    # 40 % of the crops of a clip that is long enough.
    assert 0.3 < len(absent) / 200 < 0.5
    assert all(item.waveform.abs().max() == 0 and item.word_s.tolist() == [0, 0] for item in absent)


def test_crop_of_a_longer_clip_is_full() -> None:
    source = source_of([burst_clip("a", 1.2, 0.5, keyword="yes")])
    assert {int(item.lengths) for item in items(source, 6)} == {SAMPLE_RATE_HZ}


def test_short_clip_ends_with_its_audio_or_floats_in_silence() -> None:
    source = source_of([burst_clip("a", 0.5, 0.1, keyword="yes")])
    lengths = [int(item.lengths) for item in items(source, 25)]
    assert set(lengths) == {SAMPLE_RATE_HZ // 2, SAMPLE_RATE_HZ}
    assert 0.4 < np.mean(np.array(lengths) == SAMPLE_RATE_HZ // 2) < 0.6


def test_nothing_is_heard_past_a_clip_s_length() -> None:
    noisy = replace(UNTOUCHED, p_noise=1.0, p_white=1.0, snr_db=(0.0, 0.0))
    source = source_of([burst_clip("a", 0.5, 0.1, keyword="yes")], augment=noisy)
    shorter = [item for item in items(source, 6) if item.lengths < SAMPLE_RATE_HZ]
    assert shorter
    assert all(float(item.waveform[item.lengths :].abs().max()) == 0 for item in shorter)


@pytest.mark.parametrize(("p_alone", "least", "most"), [(0.0, 0, 0), (0.8, 130, 190), (1.0, 200, 200)])
def test_short_clips_end_with_their_audio_as_often_as_asked(p_alone: float, least: int, most: int) -> None:
    source = source_of([burst_clip("a", 0.5, 0.1, keyword="yes")], p_alone=p_alone)
    ending = sum(int(item.lengths) < SAMPLE_RATE_HZ for item in items(source, 25))
    assert least <= ending <= most


def test_trimming_cuts_both_ends_and_never_the_word() -> None:
    trim_s = 0.12
    source = source_of([burst_clip("a", 0.8, 0.3, keyword="yes")], p_alone=1.0, trim_s=trim_s)
    before, after = [], []
    for item in items(source, 25):
        first, last = heard_s(item.waveform)
        assert last - first == pytest.approx(BURST_S, abs=0.002)
        assert (first, last) == pytest.approx(tuple(item.word_s.tolist()), abs=0.003)
        before.append(0.3 - first)
        after.append(0.8 - 0.3 - BURST_S - (int(item.lengths) / SAMPLE_RATE_HZ - last))
    for cut in (before, after):
        assert -0.003 < min(cut) < 0.02
        assert trim_s - 0.02 < max(cut) < trim_s + 0.003


def test_a_word_that_fills_its_clip_is_not_trimmed() -> None:
    source = source_of([burst_clip("a", BURST_S, 0.0, keyword="yes")], p_alone=1.0, trim_s=0.12)
    assert {int(item.lengths) for item in items(source, 5)} == {round(BURST_S * SAMPLE_RATE_HZ)}


def test_floating_clip_is_anywhere() -> None:
    source = source_of([burst_clip("a", 0.5, 0.1, keyword="yes")])
    starts = [float(item.word_s[0]) for item in items(source, 25) if item.lengths == SAMPLE_RATE_HZ]
    assert min(starts) < 0.15
    assert max(starts) > 0.55


def test_unaligned_keyword_is_found_by_its_level() -> None:
    clip, samples = burst_clip("a", 1.2, 0.5, keyword="yes")
    source = source_of([(replace(clip, word_start_s=None, word_end_s=None), samples)])
    for item in items(source, 4):
        assert heard_s(item.waveform) == pytest.approx(item.word_s.tolist(), abs=0.1)


def test_noise_alone_is_background_without_a_speaker(varied: list[tuple[Clip, Samples]]) -> None:
    for item in items(source_of(varied, ["en:no", "en:yes"], p_noise_only=1.0), 4):
        assert (int(item.keyword), int(item.speaker), item.word_s.tolist()) == (0, NO_SPEAKER, [0, 0])
        assert item.possible.tolist() == [True, True, True]
        assert heard_s(item.waveform)[1] > 0.9


def test_each_speed_of_a_speaker_is_a_class() -> None:
    recordings = [burst_clip(name, 0.5, 0.1, keyword="yes", speaker=name) for name in ("ann", "bob", "cem")]
    source = source_of(recordings, augment=FASTER_AND_SLOWER)
    assert source.speaker_classes == 9
    assert {int(item.speaker) for item in items(source, 25)} == set(range(9))


def test_speaker_class_tells_the_speed() -> None:
    source = source_of(
        [
            burst_clip("a", 0.5, 0.1, keyword="yes", speaker="ann"),
            burst_clip("b", 0.5, 0.1, keyword="yes", speaker="bob"),
        ],
        augment=FASTER_AND_SLOWER,
    )
    for item in items(source, 10):
        start_s, end_s = heard_s(item.waveform)
        speed = FASTER_AND_SLOWER.speeds[int(item.speaker) % 3]
        assert end_s - start_s == pytest.approx(BURST_S / speed, abs=0.004)


def test_clip_without_a_speaker_has_no_speaker(varied: list[tuple[Clip, Samples]]) -> None:
    assert {int(item.speaker) for item in items(source_of(varied[2:]), 3)} == {NO_SPEAKER}


def test_corpus_of_weight_zero_is_never_drawn(varied: list[tuple[Clip, Samples]]) -> None:
    rare = [(replace(varied[0][0], corpus="rare"), varied[0][1]), varied[1]]
    source = source_of(rare, corpus_weight={"rare": 0.0})
    assert {int(item.speaker) for item in items(source, 10)} == {source.speakers.index("bob")}


def possible(clip: Clip, *others: Clip, certain: tuple[str, ...] = ()) -> list[str]:
    """Labels that a clip's annotation says something about; `others` are there but never drawn."""
    labels = ["ar:no", "en:hey computer", "en:no", "en:yes"]
    silence = np.zeros(8000, dtype=np.float32)
    recordings = [(replace(one, path=Path(f"{at}"), duration_s=0.5), silence) for at, one in enumerate((clip, *others))]
    weights = {other.corpus: 0.0 for other in others}
    source = source_of(recordings, labels, corpus_weight=weights, certain_negatives=certain)
    row = source[0].possible[0].tolist()
    assert row[0], "background is always possible"
    return [label for label, there in zip(labels, row[1:], strict=True) if there]


def test_keyword_clip_speaks_about_all_labels() -> None:
    assert possible(replace(BASE, keyword="yes")) == ["ar:no", "en:hey computer", "en:no", "en:yes"]


def test_words_of_the_transcript_may_be_there_unmarked() -> None:
    assert possible(replace(BASE, transcript="Yes, hey computer!")) == ["ar:no", "en:no"]


def test_clip_s_own_keyword_stays_possible() -> None:
    assert possible(replace(BASE, keyword="yes", transcript="no yes")) == ["ar:no", "en:hey computer", "en:yes"]


def test_part_of_a_word_is_no_word() -> None:
    assert possible(replace(BASE, transcript="nothing, eyes")) == ["ar:no", "en:hey computer", "en:no", "en:yes"]


def test_untranscribed_speech_speaks_about_other_languages_only() -> None:
    assert possible(BASE) == ["ar:no"]


def test_untranscribed_speech_is_certain_about_rare_words() -> None:
    wake = replace(BASE, corpus="wake", keyword="hey computer")
    assert possible(BASE, wake, certain=("wake",)) == ["ar:no", "en:hey computer"]


@pytest.mark.parametrize(("threads", "workers", "left"), [(2, 1, 1), (1, 1, 1), (2, 0, 2)])
def test_a_process_that_prepares_batches_has_a_core(threads: int, workers: int, left: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with cores_for(workers):
            assert torch.get_num_threads() == left
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
