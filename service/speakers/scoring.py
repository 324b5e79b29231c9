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
    cosine = float(profile @ test)
    raw = cosine
    if cohort is not None:
        raw = 0.5 * (_normalise(cosine, profile, cohort, info) + _normalise(cosine, test, cohort, info))
    return Score(cosine, info.calibration.scale * raw + info.calibration.offset)


def probability(llr: float, prior: float) -> float:
    """Posterior of the claimed identity under `prior`."""
    log_odds = llr + math.log(prior / (1 - prior))
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))


def _normalise(cosine: float, side: Array, cohort: Array, info: SpeakerInfo) -> float:
    against = cohort @ side
    top = min(info.cohort_top, len(against))
    closest = np.partition(against, len(against) - top)[len(against) - top :]
    return (cosine - float(closest.mean())) / max(float(closest.std()), SMALLEST_DEVIATION)
