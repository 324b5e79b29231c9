"""Frame logits -> keyword scores and detections. Pure functions.

Let r_k(t) = exp(z_k(t) - z_0(t)) be the odds of keyword k against background at frame t. Under the model
that a window W holds at most one keyword, said at one of its frames (training/objectives/spotting.py),

    score_k(W) = sum_{t in W} r_k(t) / (1 + sum_j sum_{t in W} r_j(t)),

a probability over keywords and background. One window slides over the clip; a clip no longer than the
window has one score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store import KeywordInfo

# Beyond it a score is 1 to eight places, and the sums over what follows thousands of such frames still are to four.
LARGEST_LOG_ODDS = 20.0
# A detection lasts while its keyword is at least as likely as background; one whose peak barely is,
# while the odds keep this share of their peak.
EDGE_ODDS = 1.0
EDGE_SHARE = 0.05

Array = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a stretch of audio says about each of K keywords at each of its T frames; both [T, K]."""

    odds: Scores  # r_k(t)
    scores: Scores  # of the window around the frame


@dataclass(frozen=True, slots=True)
class Detection:
    """One keyword event; times in seconds from the start of the clip."""

    keyword: str
    score: float
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """A keyword's best score anywhere in the clip."""

    keyword: str
    score: float


def weigh(logits: Array, info: KeywordInfo, only: npt.NDArray[np.bool_] | None = None) -> Evidence:
    """Of logits [T, 1 + K]; frame t's window is centred on it. With `only`, a mask [K], the scores of all
    others are 0."""
    odds = _odds(logits)
    every = odds.sum(axis=1, keepdims=True)
    own = odds if only is None else odds[:, only]
    half = max(1, round(info.window_s / info.frame_hop_s)) // 2
    sums = np.concatenate([own, every], axis=1)
    sums = np.concatenate([np.zeros((1, sums.shape[1])), np.cumsum(sums, axis=0)])
    frames = np.arange(len(odds))
    first = np.maximum(frames - half, 0)
    last = np.minimum(frames + half + 1, len(odds))
    inside = np.maximum(sums[last] - sums[first], 0.0)
    scores = inside[:, :-1] / (1.0 + inside[:, -1:])
    if only is None:
        return Evidence(odds, scores)
    whole = np.zeros_like(odds)
    whole[:, only] = scores
    return Evidence(odds, whole)


def thresholds_of(info: KeywordInfo) -> Scores:
    """Each keyword's own, [K]."""
    thresholds = np.array([keyword.threshold for keyword in info.labels])
    thresholds.flags.writeable = False
    return thresholds


def least_log_odds(info: KeywordInfo, allowed: npt.NDArray[np.bool_], threshold: Scores | float) -> Scores:
    """Per keyword, [K], what its log odds against background have to reach at some frame for `detect` to find it.

    A score is at most s / (1 + s), where s sums the keyword's odds over the window's n frames, and s is at most n
    times the greatest of them: so threshold / (1 - threshold) / n is the least. Rounding has a margin of a thousandth.
    """
    frames = 2 * (max(1, round(info.window_s / info.frame_hop_s)) // 2) + 1
    wanted = np.broadcast_to(np.asarray(threshold, dtype=np.float64), allowed.shape)
    with np.errstate(divide="ignore"):
        least = np.log(wanted) - np.log1p(-wanted) - np.log(frames)
    return np.where(allowed, least - 1e-3, np.inf)


def candidates(logits: Array, least: Scores) -> npt.NDArray[np.bool_]:
    """Mask [K] of what `detect` could find in logits [T, 1 + K], by `least_log_odds`: most of what a microphone hears
    holds no keyword, and never more than a few."""
    # So that NaN, which is no evidence against anything, is looked at.
    most: Scores = (logits[:, 1:] - logits[:, :1]).max(axis=0, initial=-np.inf)
    return np.logical_not(most < least)


def rank(scores: Scores, info: KeywordInfo, top_k: int, allowed: npt.NDArray[np.bool_]) -> list[Ranked]:
    """The `top_k` allowed keywords by best score, best first."""
    best = np.where(allowed, scores.max(axis=0), -1.0)
    order = np.argsort(-best, kind="stable")[: min(top_k, int(allowed.sum()))]
    return [Ranked(info.labels[index].label, float(best[index])) for index in order]


def detect(
    found: Evidence,
    info: KeywordInfo,
    duration_s: float,
    allowed: npt.NDArray[np.bool_],
    threshold: Scores | float,
) -> list[Detection]:
    """Events in time order: where an allowed keyword's score passes the threshold, its own or one for all.

    Peaks are taken best first. A weaker peak counts only outside the time of every stronger one, whatever
    its keyword, and outside the refractory time of a stronger one of the same keyword: so a word said
    once is reported once, and one stretch of sound is one word.
    """
    scores = found.scores
    # With a threshold of 0 every frame would qualify; a score of 0 is the absence of evidence.
    passing = (scores >= threshold) & (scores > 0) & allowed
    kept: list[Detection] = []
    for frame, index in _peaks(scores, passing):
        event = _event(found.odds[:, index], scores[frame, index], frame, index, info, duration_s)
        if all(compatible(event, other, info.refractory_s) for other in kept):
            kept.append(event)
    return sorted(kept, key=lambda item: (item.start_s, item.end_s))


def allowed_labels(info: KeywordInfo, wanted: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Mask [K] of the labels asked for; all when none are. Raises KeyError for an unknown label."""
    names = {keyword.label: index for index, keyword in enumerate(info.labels)}
    mask = np.full(len(names), not wanted)
    for label in wanted:
        mask[names[label]] = True
    return mask


def _odds(logits: Array) -> Scores:
    relative = logits[:, 1:].astype(np.float64) - logits[:, :1].astype(np.float64)
    odds: Scores = np.exp(np.minimum(relative, LARGEST_LOG_ODDS))
    return odds


def _peaks(scores: Scores, passing: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(frame, keyword) of each passing run's best frame, best score first.

    A window sum has a plateau as wide as the window around a short word; its middle is the word's.
    """
    peaks: list[tuple[float, int, int]] = []
    for index in np.flatnonzero(passing.any(axis=0)):
        column, mask = scores[:, index], passing[:, index]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
        for start, stop in edges.reshape(-1, 2):
            run = column[start:stop]
            best = float(run.max())
            plateau = np.flatnonzero(run >= best * (1 - 1e-3))
            peaks.append((best, int(start + plateau[len(plateau) // 2]), int(index)))
    return [(frame, index) for _, frame, index in sorted(peaks, key=lambda peak: (-peak[0], peak[1], peak[2]))]


def _event(odds: Scores, score: np.float64, frame: int, index: int, info: KeywordInfo, duration_s: float) -> Detection:
    """Start and end: how far around the strongest frame near the peak the odds stay up."""
    reach = max(1, round(info.window_s / info.frame_hop_s)) // 2
    begin = max(0, frame - reach)
    summit = begin + int(odds[begin : frame + reach + 1].argmax())
    longest = max(1, round(1.5 * info.labels[index].typical_s / info.frame_hop_s))
    floor = min(EDGE_ODDS, odds[summit] * EDGE_SHARE)
    first = last = summit
    while first > 0 and summit - first < longest and odds[first - 1] >= floor:
        first -= 1
    while last + 1 < len(odds) and last - summit < longest and odds[last + 1] >= floor:
        last += 1
    half_hop_s = info.frame_hop_s / 2
    start_s = max(0.0, first * info.frame_hop_s - half_hop_s)
    end_s = min(duration_s, last * info.frame_hop_s + half_hop_s)
    return Detection(info.labels[index].label, float(score), start_s, max(start_s, end_s))


def compatible(found: Detection, other: Detection, refractory_s: float) -> bool:
    """Whether `found` may stand beside `other`, which is stronger or was told before."""
    centre_s, other_centre_s = (found.start_s + found.end_s) / 2, (other.start_s + other.end_s) / 2
    if other.start_s <= centre_s <= other.end_s or found.start_s <= other_centre_s <= found.end_s:
        return False
    return found.keyword != other.keyword or abs(centre_s - other_centre_s) >= refractory_s
