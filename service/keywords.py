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

# Beyond it a score is 1 to eight places.
LARGEST_LOG_ODDS = 20.0
# A detection lasts while its keyword is at least as likely as background; one whose peak barely is,
# while the odds keep this share of their peak.
EDGE_ODDS = 1.0
EDGE_SHARE = 0.05
# Between the halves of a word the odds may dip for this many frames, to this share of what keeps a detection going:
# otherwise where a word begins hangs on one frame, and on what was said before it.
DIP_FRAMES = 2
DIP_SHARE = 0.25
_LEAST_SCORE = float(np.finfo(np.float32).tiny)

Array = npt.NDArray[np.float32]
Thresholds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a stretch of audio says about each of K keywords at each of its T frames."""

    odds: Array  # r_k(t), [T, K]
    scores: Array  # of the window around the frame, [T, K]
    best: Array  # each keyword's highest score, [K]


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
    half = max(1, round(info.window_s / info.frame_hop_s)) // 2
    odds = _odds(logits, beside=half)
    inside = _sums(odds if only is None else odds[:, np.concatenate([[True], only])], 2 * half + 1)
    scores = (inside / (1 + inside[:, :1]))[:, 1:]
    if only is not None:
        part, scores = scores, np.zeros((len(scores), len(only)), np.float32)
        scores[:, only] = part
    return Evidence(odds[half : half + len(logits), 1:], scores, scores.max(axis=0, initial=0.0))


def thresholds_of(info: KeywordInfo) -> Thresholds:
    """Each keyword's own, [K]."""
    thresholds = np.array([keyword.threshold for keyword in info.labels])
    thresholds.flags.writeable = False
    return thresholds


def least_log_odds(info: KeywordInfo, allowed: npt.NDArray[np.bool_], threshold: Thresholds | float) -> Thresholds:
    """Per keyword, [K], what its log odds against background have to reach at some frame for `detect` to find it.

    A score is at most s / (1 + s), where s sums the keyword's odds over the window's n frames, and s is at most n
    times the greatest of them: so threshold / (1 - threshold) / n is the least. Rounding has a margin of a thousandth.
    """
    frames = 2 * (max(1, round(info.window_s / info.frame_hop_s)) // 2) + 1
    wanted = np.broadcast_to(np.asarray(threshold, dtype=np.float64), allowed.shape)
    with np.errstate(divide="ignore"):
        least = np.log(wanted) - np.log1p(-wanted) - np.log(frames)
    return np.where(allowed, least - 1e-3, np.inf)


def candidates(logits: Array, least: Thresholds) -> npt.NDArray[np.bool_]:
    """Mask [K] of what `detect` could find in logits [T, 1 + K], by `least_log_odds`: most of what a microphone hears
    holds no keyword, and never more than a few."""
    # So that NaN, which is no evidence against anything, is looked at.
    most: Array = (logits[:, 1:] - logits[:, :1]).max(axis=0, initial=-np.inf)
    return np.logical_not(most < least)


def rank(found: Evidence, info: KeywordInfo, top_k: int, allowed: npt.NDArray[np.bool_]) -> list[Ranked]:
    """The `top_k` allowed keywords by best score, best first."""
    best = np.where(allowed, found.best, -1.0)
    order = np.argsort(-best, kind="stable")[:top_k].tolist()
    return [Ranked(info.labels[index].label, score) for index in order if (score := float(best[index])) >= 0.0]


def detect(
    found: Evidence,
    info: KeywordInfo,
    duration_s: float,
    allowed: npt.NDArray[np.bool_],
    threshold: Thresholds | float,
) -> list[Detection]:
    """Events in time order: where an allowed keyword's score passes the threshold, its own or one for all.

    Peaks are taken best first. A weaker peak counts only outside the time of every stronger one, whatever
    its keyword, and outside the refractory time of a stronger one of the same keyword: so a word said
    once is reported once, and one stretch of sound is one word.
    """
    # With a threshold of 0 every frame would qualify; a score of 0 is the absence of evidence.
    least = np.maximum(threshold, _LEAST_SCORE)
    likely = ((found.best >= least) & allowed).nonzero()[0].tolist()
    if not likely:
        return []
    kept: list[Detection] = []
    for frame, index in _peaks(found.scores, likely, least if least.ndim else np.full(len(allowed), least)):
        event = _event(found.odds[:, index], found.scores[frame, index], frame, index, info, duration_s)
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


def _odds(logits: Array, *, beside: int) -> Array:
    """[T, 1 + K] with `beside` empty frames before and behind; in background's place the sum over all keywords."""
    relative = logits - logits[:, :1]
    np.minimum(relative, LARGEST_LOG_ODDS, out=relative)
    odds = np.zeros((len(logits) + 2 * beside, logits.shape[1]), np.float32)
    np.exp(relative, out=odds[beside : beside + len(logits)])
    odds[:, 0] = odds[:, 1:].sum(axis=1)
    return odds


def _sums(values: Array, width: int) -> Array:
    """Over each `width` frames of [T, N], T - width + 1 of them, put together from sums over 1, 2, 4 ... frames: by
    additions alone, so that nothing small is lost beside something large that has passed, and float32 is enough."""
    count = len(values) - width + 1
    total: Array | None = None
    reach, done = 1, 0
    while True:
        if width & reach:
            part = values[done : done + count]
            total = part if total is None else total + part
            done += reach
            if done == width:
                return total
        values = values[:-reach] + values[reach:]
        reach *= 2


def _peaks(scores: Array, likely: list[int], least: Thresholds) -> list[tuple[int, int]]:
    """(frame, keyword) of each run's best frame that passes, of the likely keywords, best score first.

    A window sum has a plateau as wide as the window around a short word; its middle is the word's.
    """
    peaks: list[tuple[float, int, int]] = []
    for index in likely:
        column = scores[:, index]
        for start, stop in _runs((column >= least[index]).nonzero()[0]):
            run = column[start:stop]
            best = float(run.max())
            plateau = (run >= best * (1 - 1e-3)).nonzero()[0]
            peaks.append((best, int(start + plateau[len(plateau) // 2]), index))
    return [(frame, index) for _, frame, index in sorted(peaks, key=lambda peak: (-peak[0], peak[1], peak[2]))]


def _runs(frames: npt.NDArray[np.intp]) -> list[tuple[int, int]]:
    """First and one past the last of each stretch without a gap; `frames` ascend and are not none."""
    first, last = int(frames[0]), int(frames[-1])
    if last - first + 1 == len(frames):
        return [(first, last + 1)]
    gaps = np.flatnonzero(np.diff(frames) > 1)
    starts = [first, *frames[gaps + 1].tolist()]
    return list(zip(starts, [*(frames[gaps] + 1).tolist(), last + 1], strict=True))


def _event(odds: Array, score: np.float32, frame: int, index: int, info: KeywordInfo, duration_s: float) -> Detection:
    """Start and end: how far around the strongest frame near the peak the odds stay up."""
    reach = max(1, round(info.window_s / info.frame_hop_s)) // 2
    begin = max(0, frame - reach)
    summit = begin + int(odds[begin : frame + reach + 1].argmax())
    longest = max(1, round(1.5 * info.labels[index].typical_s / info.frame_hop_s))
    floor = min(EDGE_ODDS, odds[summit] * EDGE_SHARE)
    first = summit - _stays(odds[max(0, summit - longest) : summit + 1][::-1], floor)
    last = summit + _stays(odds[summit : summit + longest + 1], floor)
    half_hop_s = info.frame_hop_s / 2
    start_s = max(0.0, first * info.frame_hop_s - half_hop_s)
    end_s = min(duration_s, last * info.frame_hop_s + half_hop_s)
    return Detection(info.labels[index].label, float(score), start_s, max(start_s, end_s))


def _stays(odds: Array, floor: float) -> int:
    """How many frames after the first the odds stay up, short dips counted where they come up again."""
    up = 0
    for frame, value in enumerate(odds.tolist()):
        if value >= floor:
            up = frame
        elif value < floor * DIP_SHARE or frame - up > DIP_FRAMES:
            break
    return up


def compatible(found: Detection, other: Detection, refractory_s: float) -> bool:
    """Whether `found` may stand beside `other`, which is stronger or was told before."""
    centre_s, other_centre_s = (found.start_s + found.end_s) / 2, (other.start_s + other.end_s) / 2
    if other.start_s <= centre_s <= other.end_s or found.start_s <= other_centre_s <= found.end_s:
        return False
    return found.keyword != other.keyword or abs(centre_s - other_centre_s) >= refractory_s
