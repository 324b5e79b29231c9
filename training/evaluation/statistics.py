"""Error rates of scores, with confidence intervals. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
NORMAL = NormalDist()
# Of bootstraps.
DRAWS, EER_DRAWS = 2000, 300


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its 95 % interval (Wilson 1927)."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if self.total == 0:
            return math.nan, math.nan
        z, n, p = 1.96, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def rate_of(outcomes: Sequence[bool | np.bool_]) -> Rate:
    """How many of them are true."""
    return Rate(int(sum(map(bool, outcomes))), len(outcomes))


def interval_over_people(people: Sequence[Rate]) -> tuple[float, float]:
    """95 % interval of the share that all of them make, each person drawn anew with all clips (bootstrap over clusters,
    Field & Welsh 2007): clips of one person are right or wrong together, so `Rate.interval` is too narrow for them."""
    if not any(person.total for person in people):
        return math.nan, math.nan
    hits = np.array([person.hits for person in people], dtype=np.float64)
    totals = np.array([person.total for person in people], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(people), size=(DRAWS, len(people)))
    low, high = np.percentile(hits[drawn].sum(axis=1) / totals[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def eer_interval_over_people(corpora: Sequence[Sequence[tuple[Scores, Scores]]]) -> tuple[float, float]:
    """95 % interval of the equal error rate of all trials together. Of each corpus, (target, impostor) scores by the
    person who speaks in the test, who is drawn anew with all of them, within the corpus."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(EER_DRAWS):
        drawn = [people[index] for people in corpora for index in rng.integers(len(people), size=len(people))]
        targets, impostors = (np.concatenate(each) for each in zip(*drawn, strict=True))
        rates.append(equal_error_rate(targets, impostors))
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def equal_error_rate(targets: Scores, impostors: Scores) -> float:
    """Where false rejects and false accepts are equally frequent, interpolated on the convex-free ROC."""
    misses, accepts, _ = error_rates(targets, impostors)
    index = int(np.argmax(misses >= accepts))
    if index == 0:
        return float((misses[0] + accepts[0]) / 2)
    before = accepts[index - 1] - misses[index - 1]
    after = accepts[index] - misses[index]
    share = before / (before - after) if before != after else 0.0
    return float(misses[index - 1] + share * (misses[index] - misses[index - 1]))


def error_rates(targets: Scores, impostors: Scores) -> tuple[Scores, Scores, Scores]:
    """(miss rate, false-accept rate, threshold) as the threshold rises; a score at it is accepted."""
    thresholds = np.unique(np.concatenate([targets, impostors, [np.inf]]))
    misses = np.searchsorted(np.sort(targets), thresholds, side="left") / len(targets)
    accepts = 1 - np.searchsorted(np.sort(impostors), thresholds, side="left") / len(impostors)
    return misses, accepts, thresholds


def det_points(targets: Scores, impostors: Scores, *, most: int = 200) -> list[tuple[float, float]]:
    """(false-accept rate, miss rate) along the curve of Martin et al. 1997, at most so many points, evenly
    spaced in normal deviates."""
    misses, accepts, _ = error_rates(targets, impostors)
    inside = (misses > 0) & (misses < 1) & (accepts > 0) & (accepts < 1)
    misses, accepts = misses[inside], accepts[inside]
    if len(misses) == 0:
        return []
    deviates = np.array([NORMAL.inv_cdf(float(rate)) for rate in accepts])
    wanted = np.linspace(deviates[0], deviates[-1], min(most, len(deviates)))
    chosen = np.unique(np.abs(deviates[None, :] - wanted[:, None]).argmin(axis=1))
    return [(float(accepts[index]), float(misses[index])) for index in chosen]


def minimum_dcf(targets: Scores, impostors: Scores, *, p_target: float = 0.01) -> float:
    """Smallest normalised detection cost at unit costs (NIST SRE)."""
    misses, accepts, _ = error_rates(targets, impostors)
    cost = p_target * misses + (1 - p_target) * accepts
    return float(cost.min() / min(p_target, 1 - p_target))


def cllr(targets: Scores, impostors: Scores) -> float:
    """Cost of log-likelihood ratios in bits (Brümmer & du Preez 2006, eq. 12); 1 is knowing nothing."""
    finite_targets = np.clip(targets, -50, 50)
    finite_impostors = np.clip(impostors, -50, 50)
    loss = np.log1p(np.exp(-finite_targets)).mean() + np.log1p(np.exp(finite_impostors)).mean()
    return float(loss / (2 * math.log(2)))


def fit_calibration(targets: Scores, impostors: Scores) -> tuple[float, float]:
    """(scale, offset) of the affine map to log-likelihood ratios that minimises Cllr.

    Logistic regression in which both classes weigh the same, by Newton's method.
    """
    x = np.concatenate([targets, impostors])
    y = np.concatenate([np.ones(len(targets)), np.zeros(len(impostors))])
    w = np.concatenate([np.full(len(targets), 0.5 / len(targets)), np.full(len(impostors), 0.5 / len(impostors))])
    centre, spread = float(x.mean()), float(x.std()) or 1.0
    design = np.stack([(x - centre) / spread, np.ones_like(x)], axis=1)
    theta = np.zeros(2)
    # A trace of weight decay keeps perfectly separable scores from running to infinity.
    ridge = 1e-6

    def cost(at: Scores) -> float:
        logit = design @ at
        return float(w @ (np.logaddexp(0, logit) - y * logit) + ridge / 2 * at @ at)

    for _ in range(100):
        p = 0.5 * (1 + np.tanh(design @ theta / 2))
        gradient = design.T @ (w * (p - y)) + ridge * theta
        hessian = design.T @ (design * (w * p * (1 - p))[:, None]) + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # A full step overshoots, and then runs away, where a few scores lie far out.
        while cost(theta - step) > cost(theta) and float(np.abs(step).max()) >= 1e-9:
            step /= 2
        theta -= step
        if float(np.abs(step).max()) < 1e-9:
            break
    scale = float(theta[0]) / spread
    return scale, float(theta[1]) - scale * centre


def threshold_for_false_alarms(scores: Scores, allowed: int) -> float:
    """The lowest threshold that at most `allowed` of the false alarms' scores reach."""
    ranked = np.sort(scores)[::-1]
    if len(ranked) <= allowed:
        return 0.0
    return float(np.nextafter(ranked[allowed], np.inf))
