"""Two speaker embeddings -> a calibrated log-likelihood ratio. Pure functions.

    cosine        of the profile (mean of unit embeddings, renormalised) and the test embedding
    normalised    adaptive symmetric normalisation (Matejka et al. 2017) where the bundle has a cohort:
                  ½[(s - mean_e)/sd_e + (s - mean_t)/sd_t] over each side's closest cohort speakers
    score         scale * normalised + offset, natural-log likelihood ratio (Brümmer & du Preez 2006)

`training.calibrate` fits scale and offset through HTTP, on scores that this module computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store import SpeakerInfo

Array = npt.NDArray[np.float32]
SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True, slots=True)
class Score:
    """cosine in [-1, 1]; llr in nats."""

    cosine: float
    llr: float


def profile_vector(embeddings: Array) -> Array:
    """[n, D] unit embeddings -> unit mean [D]."""
    mean = embeddings.mean(axis=0)
    unit: Array = mean / max(float(np.linalg.norm(mean)), 1e-9)
    return unit


def score(profile: Array, test: Array, info: SpeakerInfo, cohort: Array | None) -> Score:
    """Both vectors [D] of unit length."""
    return scores(profile[None], test, info, cohort)[0]


def scores(profiles: Array, test: Array, info: SpeakerInfo, cohort: Array | None) -> list[Score]:
    """One test [D] against many profiles [n, D], all of unit length, in their order."""
    cosines, llrs = compare(profiles, near(profiles, cohort, info), test, info, cohort)
    return [Score(float(cosine), float(llr)) for cosine, llr in zip(cosines, llrs, strict=True)]


def near(vectors: Array, cohort: Array | None, info: SpeakerInfo) -> Array:
    """Means and deviations [n, 2] of the cosines of unit vectors [n, D] with their closest cohort speakers; 0 and 1
    where the bundle has no cohort."""
    if cohort is None:
        return np.tile(np.array([0, 1], dtype=np.float32), (len(vectors), 1))
    against = vectors @ cohort.T
    top = min(info.cohort_top, len(cohort))
    closest = np.partition(against, len(cohort) - top, axis=1)[:, len(cohort) - top :]
    return np.stack([closest.mean(axis=1), np.maximum(closest.std(axis=1), SMALLEST_DEVIATION)], axis=1)


def compare(
    profiles: Array, profiles_near: Array, test: Array, info: SpeakerInfo, cohort: Array | None
) -> tuple[Array, npt.NDArray[np.float64]]:
    """One test [D] against many profiles [n, D] whose `near` is known: cosines [n] and log-likelihood ratios [n]."""
    cosines = profiles @ test
    mean, deviation = near(test[None], cohort, info)[0]
    normalised = 0.5 * ((cosines - profiles_near[:, 0]) / profiles_near[:, 1] + (cosines - mean) / deviation)
    return cosines, info.calibration.scale * normalised.astype(np.float64) + info.calibration.offset


def probability(llr: float, prior: float) -> float:
    """Posterior of the claimed identity under `prior`."""
    log_odds = llr + math.log(prior / (1 - prior))
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))
