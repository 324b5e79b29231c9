"""Error rates and calibration on scores whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from training.evaluation.statistics import (
    Rate,
    cllr,
    eer_interval_over_people,
    equal_error_rate,
    error_rates,
    fit_calibration,
    interval_over_people,
    minimum_dcf,
    threshold_for_false_alarms,
)

Scores = npt.NDArray[np.float64]


def gaussians(distance: float, count: int = 20_000, seed: int = 0) -> tuple[Scores, Scores]:
    """Targets around +distance/2 and impostors around -distance/2, deviation 1."""
    rng = np.random.default_rng(seed)
    return rng.normal(distance / 2, 1, count), rng.normal(-distance / 2, 1, count)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0, 4.0])
def test_equal_error_rate_of_gaussians(distance: float) -> None:
    expected = 0.5 * math.erfc(distance / 2 / math.sqrt(2))
    assert equal_error_rate(*gaussians(distance)) == pytest.approx(expected, abs=0.01)


def test_equal_error_rate_of_few_trials_lies_between_the_steps() -> None:
    # A third of the targets is missed both where half and where none of the impostors is accepted.
    targets, impostors = np.array([1.0, 3.0, 4.0]), np.array([0.0, 2.5])
    assert equal_error_rate(targets, impostors) == pytest.approx(1 / 3)


def test_equal_error_rate_is_zero_for_separable_scores() -> None:
    assert equal_error_rate(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 0.0


def test_equal_error_rate_is_one_for_reversed_scores() -> None:
    assert equal_error_rate(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1.0


def test_equal_error_rate_is_a_half_for_equal_scores() -> None:
    assert equal_error_rate(np.zeros(5), np.zeros(7)) == 0.5


def test_score_at_the_threshold_is_accepted() -> None:
    misses, accepts, thresholds = error_rates(np.array([1.0, 2.0]), np.array([1.0]))
    assert thresholds.tolist() == [1.0, 2.0, math.inf]
    assert misses.tolist() == [0.0, 0.5, 1.0]
    assert accepts.tolist() == [1.0, 0.0, 0.0]


def test_minimum_dcf_of_separable_scores_is_zero() -> None:
    assert minimum_dcf(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 0.0


def test_minimum_dcf_of_useless_scores_is_one() -> None:
    # Turning everyone away costs exactly one, and nothing is better.
    assert minimum_dcf(np.zeros(5), np.zeros(7)) == 1.0
    assert minimum_dcf(np.zeros(5), np.ones(7)) == 1.0


def test_minimum_dcf_weighs_false_accepts_by_99() -> None:
    # Either miss one target in ten, or accept one impostor in a thousand: 0.1 against 0.099.
    targets = np.array([1.0] + [3.0] * 9)
    impostors = np.array([2.0] + [0.0] * 999)
    assert minimum_dcf(targets, impostors) == pytest.approx(0.099)


def test_cllr_of_knowing_nothing_is_one_bit() -> None:
    assert cllr(np.zeros(3), np.zeros(8)) == pytest.approx(1.0, abs=1e-12)


def test_cllr_of_certainty_is_zero_and_of_error_is_many_bits() -> None:
    assert cllr(np.full(3, 50.0), np.full(3, -50.0)) < 1e-12
    assert cllr(np.full(3, -50.0), np.full(3, 50.0)) > 70


def test_cllr_is_least_where_ratios_are_calibrated() -> None:
    # Gaussians at a distance d with deviation 1 have the log-likelihood ratio d * x.
    targets, impostors = gaussians(2.0)
    calibrated = cllr(2 * targets, 2 * impostors)
    assert calibrated < cllr(targets, impostors)
    assert calibrated < cllr(4 * targets, 4 * impostors)
    assert calibrated < cllr(2 * targets + 1, 2 * impostors + 1)


def test_cllr_is_finite_for_infinite_scores() -> None:
    assert math.isfinite(cllr(np.array([-math.inf, 1.0]), np.array([math.inf])))


@pytest.mark.parametrize(("stretch", "shift"), [(1.0, 0.0), (0.1, 0.5), (30.0, -200.0)])
def test_calibration_recovers_the_ratios_of_gaussians(stretch: float, shift: float) -> None:
    targets, impostors = gaussians(2.0)
    scale, offset = fit_calibration(stretch * targets + shift, stretch * impostors + shift)
    assert scale * stretch == pytest.approx(2.0, rel=0.05)
    assert offset + scale * shift == pytest.approx(0.0, abs=0.05)


def test_calibration_does_not_depend_on_how_many_impostors_there_are() -> None:
    targets, impostors = gaussians(2.0)
    _, offset = fit_calibration(targets[:500], impostors)
    assert offset == pytest.approx(0.0, abs=0.15)


def test_calibration_of_separable_scores_is_finite() -> None:
    scale, offset = fit_calibration(np.array([0.8, 0.9]), np.array([0.1, 0.2, 0.3]))
    assert 0 < scale < 1e3
    assert -scale * 0.8 < offset < -scale * 0.3


@pytest.mark.parametrize("outlier", [-1e4, -300.0, 300.0, 1e4])
def test_calibration_survives_an_outlier(outlier: float) -> None:
    # Full Newton steps run away here.
    targets, impostors = gaussians(3.0, count=40)
    impostors[0] = outlier
    scale, offset = fit_calibration(targets, impostors)
    assert cllr(scale * targets + offset, scale * impostors + offset) <= 1.0 + 1e-6


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_threshold_lets_only_the_allowed_alarms_through(allowed: int) -> None:
    scores = np.array([0.2, 0.9, 0.5, 0.7, 0.4])
    threshold = threshold_for_false_alarms(scores, allowed)
    assert (scores >= threshold).sum() == allowed
    # The lowest such: at the next lower score there would be one too many.
    assert threshold - sorted(scores)[-1 - allowed] < 1e-12


def test_threshold_of_equal_scores_turns_them_all_away() -> None:
    scores = np.full(4, 0.6)
    assert (scores >= threshold_for_false_alarms(scores, 2)).sum() == 0


def test_threshold_of_too_few_alarms_is_zero() -> None:
    assert threshold_for_false_alarms(np.array([0.9, 0.8]), 2) == 0.0


def test_wilson_interval() -> None:
    # Wilson (1927), as tabulated by Brown, Cai & DasGupta (2001): 0 of 10 and 5 of 10.
    assert Rate(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Rate(5, 10).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_rate_of_nothing_is_not_a_number() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert all(map(math.isnan, Rate(0, 0).interval))


def test_an_interval_over_people_is_wider_where_they_differ() -> None:
    """Three people of whom one is never heard: Wilson's 600 independent trials know the rate far too well."""
    people = [Rate(200, 200), Rate(200, 200), Rate(0, 200)]
    low, high = interval_over_people(people)
    alone = Rate(400, 600).interval
    assert low < alone[0] - 0.2
    assert high > alone[1] + 0.2
    assert interval_over_people([Rate(3, 4)] * 50) == pytest.approx((0.75, 0.75))
    assert all(math.isnan(end) for end in interval_over_people([]))


def test_an_interval_of_the_equal_error_rate_holds_it_and_follows_people() -> None:
    rng = np.random.default_rng(1)
    easy = [(rng.normal(6, 1, 50), rng.normal(0, 1, 50)) for _ in range(5)]
    hard = [(rng.normal(0, 1, 50), rng.normal(0, 1, 50))]
    low, high = eer_interval_over_people([easy + hard])
    targets, impostors = (np.concatenate(each) for each in zip(*(easy + hard), strict=True))
    assert low < equal_error_rate(targets, impostors) < high
    assert low < 0.02
    assert high > 0.15
