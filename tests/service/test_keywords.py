"""Scores and detections from frame logits made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model_store import Keyword, KeywordInfo
from service.keywords import (
    LARGEST_LOG_ODDS,
    Detection,
    allowed_labels,
    candidates,
    detect,
    least_log_odds,
    rank,
    thresholds_of,
    weigh,
)

HOP_S = 0.04
INFO = KeywordInfo(
    labels=tuple(
        Keyword(label=label, threshold=threshold, typical_s=0.6)
        for label, threshold in (("en:yes", 0.5), ("en:no", 0.5), ("ar:stop", 0.8))
    ),
    frame_hop_s=HOP_S,
    window_s=1.0,
    refractory_s=0.8,
    thresholds_from="these tests",
)


def logits(duration_s: float, *words: tuple[int, float, float, float]) -> np.ndarray:
    """Background everywhere at log odds -8; (class, start_s, end_s, log odds) for each word."""
    frames = round(duration_s / HOP_S)
    table = np.full((frames, 4), -8.0, dtype=np.float32)
    table[:, 0] = 0.0
    for kind, start_s, end_s, log_odds in words:
        table[round(start_s / HOP_S) : round(end_s / HOP_S), kind] = log_odds
    return table


def found(table: np.ndarray, *wanted: str, threshold: float | None = None) -> list[Detection]:
    least = thresholds_of(INFO) if threshold is None else threshold
    return detect(weigh(table, INFO), INFO, len(table) * HOP_S, allowed_labels(INFO, wanted), least)


def test_a_score_is_the_probability_of_one_word_in_the_window() -> None:
    table = logits(0.4, (1, 0.2, 0.24, 1.0))
    odds = np.exp(table[:, 1:].astype(float)).sum(axis=0)
    assert weigh(table, INFO).scores[5] == pytest.approx(odds / (1 + odds.sum()))


@pytest.mark.parametrize("highest", [3.0, 30.0])
def test_scores_are_those_of_each_window_by_itself(highest: float) -> None:
    """Also after a word that nothing could be surer of."""
    rng = np.random.default_rng(3)
    table = logits(30.0, (1, 2.0, 12.0, highest), (2, 20.0, 20.4, -1.0))
    table[:, 1:] += rng.normal(0, 0.1, table[:, 1:].shape)
    odds = np.exp(np.minimum(table[:, 1:].astype(float), LARGEST_LOG_ODDS))
    half = round(INFO.window_s / HOP_S) // 2
    for frame, score in enumerate(weigh(table, INFO).scores):
        inside = odds[max(0, frame - half) : frame + half + 1].sum(axis=0)
        assert score == pytest.approx(inside / (1 + inside.sum()), abs=1e-6)


def test_background_scores_low() -> None:
    assert weigh(logits(5.0), INFO).scores.max() < 0.02


def test_extreme_logits_stay_finite() -> None:
    table = logits(1.0, (1, 0.2, 0.6, 4e4))
    scores = weigh(table, INFO).scores
    assert np.isfinite(scores).all()
    assert scores.max() == pytest.approx(1.0)


def test_a_word_said_once_is_detected_once_where_it_was_said() -> None:
    (event,) = found(logits(10.0, (1, 4.0, 4.6, 5.0)))
    assert event.keyword == "en:yes"
    assert event.start_s == pytest.approx(4.0, abs=HOP_S)
    assert event.end_s == pytest.approx(4.6, abs=HOP_S)


def test_five_words_in_a_minute_are_five_detections_in_order() -> None:
    words = [(1, 5.0, 5.5, 4.0), (2, 15.0, 15.6, 4.0), (1, 25.0, 25.5, 4.0), (3, 40.0, 40.7, 5.0), (2, 58.0, 58.5, 4.0)]
    events = found(logits(60.0, *words))
    assert [event.keyword for event in events] == ["en:yes", "en:no", "en:yes", "ar:stop", "en:no"]
    assert [event.start_s for event in events] == pytest.approx([word[1] for word in words], abs=2 * HOP_S)


def test_the_same_word_within_the_refractory_time_counts_once() -> None:
    assert len(found(logits(6.0, (1, 2.0, 2.2, 5.0), (1, 2.5, 2.7, 5.0)))) == 1


def test_the_same_word_after_the_refractory_time_counts_again() -> None:
    assert len(found(logits(8.0, (1, 2.0, 2.4, 5.0), (1, 4.5, 4.9, 5.0)))) == 2


def test_of_two_words_at_one_place_the_stronger_is_reported() -> None:
    events = found(logits(4.0, (1, 2.0, 2.5, 4.0), (2, 2.0, 2.5, 5.0)), threshold=0.05)
    assert [event.keyword for event in events] == ["en:no"]


def test_each_keyword_has_its_own_threshold() -> None:
    odds = np.log(2.0 / 13)  # over 13 frames: odds of 2, a score of 2/3
    assert [event.keyword for event in found(logits(3.0, (1, 1.0, 1.52, odds)))] == ["en:yes"]
    assert found(logits(3.0, (3, 1.0, 1.52, odds))) == []


def test_a_caller_may_override_all_thresholds() -> None:
    odds = np.log(2.0 / 13)
    assert [event.keyword for event in found(logits(3.0, (3, 1.0, 1.52, odds)), threshold=0.6)] == ["ar:stop"]
    assert found(logits(3.0, (1, 1.0, 1.52, odds)), threshold=0.7) == []


def test_only_the_keywords_asked_for_are_reported() -> None:
    table = logits(6.0, (1, 1.0, 1.5, 5.0), (2, 4.0, 4.5, 5.0))
    assert [event.keyword for event in found(table, "en:no")] == ["en:no"]


def test_times_stay_within_the_clip() -> None:
    (event,) = found(logits(0.5, (1, 0.0, 0.52, 6.0)))
    assert (event.start_s, event.end_s) == (0.0, pytest.approx(0.48, abs=0.05))


def test_a_short_dip_between_the_halves_of_a_word_does_not_end_it() -> None:
    table = logits(3.0, (1, 1.0, 1.2, 2.0), (1, 1.2, 1.28, -0.7), (1, 1.28, 1.48, 5.0))
    event = found(table)
    assert [(item.start_s, item.end_s) for item in event] == [pytest.approx((1.0, 1.48), abs=HOP_S)]


@pytest.mark.parametrize(("until_s", "log_odds"), [(1.32, -0.7), (1.28, -3.0)], ids=["long", "deep"])
def test_any_other_dip_ends_it(until_s: float, log_odds: float) -> None:
    table = logits(3.0, (1, 1.0, 1.2, 2.0), (1, 1.2, until_s, log_odds), (1, until_s, 1.6, 5.0))
    event = found(table)
    assert [(item.start_s, item.end_s) for item in event] == [pytest.approx((until_s, 1.6), abs=HOP_S)]


def test_the_ranking_is_ordered_and_as_long_as_asked() -> None:
    evidence = weigh(logits(3.0, (2, 1.0, 1.5, 3.0), (1, 1.0, 1.5, 1.0)), INFO)
    ranking = rank(evidence, INFO, 2, allowed_labels(INFO, ()))
    assert [item.keyword for item in ranking] == ["en:no", "en:yes"]
    assert ranking[0].score > ranking[1].score


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(KeyError):
        allowed_labels(INFO, ("en:maybe",))


def test_a_single_frame_is_enough_of_a_clip() -> None:
    table = logits(HOP_S, (1, 0.0, HOP_S, 4.0))
    assert weigh(table, INFO).scores.shape == (1, 3)
    assert len(found(table)) == 1


def test_no_frame_holds_nothing() -> None:
    """As the end of a stream may, with a threshold that everything passes."""
    assert found(logits(0.0), threshold=0.0) == []


@pytest.mark.parametrize("threshold", [None, 0.02, 0.97])
@pytest.mark.parametrize("wanted", [(), ("en:no",)])
def test_looking_at_candidates_alone_finds_the_same(wanted: tuple[str, ...], threshold: float | None) -> None:
    rng = np.random.default_rng(7)
    least = thresholds_of(INFO) if threshold is None else threshold
    allowed = allowed_labels(INFO, wanted)
    events = passed_over = 0
    for _ in range(300):
        table = logits(float(rng.uniform(0.04, 3.0)))
        # From far below every threshold to far above, so that many are near it.
        table[:, 1:] += rng.normal(0, 1, table[:, 1:].shape) + rng.uniform(-4, 14, (1, 3))
        everything = detect(weigh(table, INFO), INFO, len(table) * HOP_S, allowed, least)
        likely = candidates(table, least_log_odds(INFO, allowed, least))
        assert detect(weigh(table, INFO, likely), INFO, len(table) * HOP_S, allowed, least) == everything
        events, passed_over = events + len(everything), passed_over + int((allowed & ~likely).sum())
    assert events > 20
    assert passed_over > 20


def test_background_holds_no_candidate() -> None:
    least = least_log_odds(INFO, allowed_labels(INFO, ()), thresholds_of(INFO))
    assert not candidates(logits(1.0), least).any()
    # The greatest odds that a window of so many frames may have without a score at the threshold, and a little more.
    frames = 2 * (round(INFO.window_s / HOP_S) // 2) + 1
    table = logits(1.0)
    table[:, 1] = -np.log(frames)
    assert candidates(table, least).tolist() == [True, False, False]
    table[:, 1] -= 0.1
    assert not candidates(table, least).any()


def test_what_is_no_number_is_looked_at() -> None:
    table = logits(1.0)
    table[3, 2] = np.nan
    least = least_log_odds(INFO, allowed_labels(INFO, ()), thresholds_of(INFO))
    assert candidates(table, least).tolist() == [False, True, False]
