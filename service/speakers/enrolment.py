"""Which clips may join a profile. Pure functions: a refused clip changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from model_store import SpeakerInfo
from service.speakers.scoring import profile_vector, score
from service.speech import SpeechQuality

Array = npt.NDArray[np.float32]

# A syllable; below this an embedding says more about the vowel than about the person.
LEAST_CLIP_SPEECH_S = 0.25
# Azure's service drew the line at the same level.
LEAST_SNR_DB = 2.0
# One sample in fifty at full scale is audible distortion, beyond an occasional clipped peak.
MOST_CLIPPED = 0.02
# Odds of 55 to 1 that the clip is another person's, given the clips before it.
LEAST_CONSISTENCY_LLR = -4.0


class Refusal(StrEnum):
    """Why a clip did not join the profile."""

    NO_SPEECH = "no_speech"
    TOO_SHORT = "too_short"
    TOO_NOISY = "too_noisy"
    CLIPPED = "clipped"
    DIFFERENT_SPEAKER = "different_speaker"


# Of a clip that is shorter than the model takes.
UNHEARD = SpeechQuality(speech_s=0.0, snr_db=0.0, clipped_ratio=0.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A clip offered for enrolment; embedding [D], unit length, None where the clip is too short to have one."""

    quality: SpeechQuality
    embedding: Array | None


def judge(
    candidates: Sequence[Candidate], before: Sequence[Array], info: SpeakerInfo, cohort: Array | None
) -> list[Refusal | None]:
    """For each candidate in order, why it is refused, or None. Accepted ones count as clips before the
    next; `before` are the embeddings already in the profile."""
    known = list(before)
    verdicts: list[Refusal | None] = []
    for candidate in candidates:
        verdicts.append(_verdict(candidate, known, info, cohort))
        if verdicts[-1] is None and candidate.embedding is not None:
            known.append(candidate.embedding)
    return verdicts


def _verdict(candidate: Candidate, known: Sequence[Array], info: SpeakerInfo, cohort: Array | None) -> Refusal | None:
    if candidate.embedding is None:
        return Refusal.TOO_SHORT
    verdict = refuse_quality(candidate.quality)
    if verdict is None and known:
        consistency = score(profile_vector(np.stack(known)), candidate.embedding, info, cohort)
        if consistency.llr < LEAST_CONSISTENCY_LLR:
            return Refusal.DIFFERENT_SPEAKER
    return verdict


def refuse_quality(quality: SpeechQuality) -> Refusal | None:
    """What the recording itself lacks, the most telling reason first."""
    if quality.clipped_ratio > MOST_CLIPPED:
        return Refusal.CLIPPED
    if quality.speech_s == 0:
        return Refusal.NO_SPEECH
    if quality.speech_s < LEAST_CLIP_SPEECH_S:
        return Refusal.TOO_SHORT
    if quality.snr_db < LEAST_SNR_DB:
        return Refusal.TOO_NOISY
    return None
