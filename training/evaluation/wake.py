"""Wake words among everything else: misses where false alarms keep to a rate.

Whoever finds the words gives scores for each recording; thresholds are read off here, so that another system is
held to the very same rate on the very same audio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.evaluation.client import ServiceClient, Upload
from training.evaluation.recordings import as_recorded, with_noise
from training.evaluation.statistics import Rate, rate_of, threshold_for_false_alarms
from training.manifest import Clip, Data, Recording

WAKE_CORPUS = "pvwake"
# Scores below this never matter at one false alarm an hour.
CANDIDATE_THRESHOLD = 0.05

# Of one recording: each word's scores, wherever in it the word was found.
Found = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class WakeAudio:
    """What is listened to, and for which words."""

    words: list[str]
    audio: list[Clip | Recording]
    send: Callable[[Clip | Recording], Upload]


@dataclass(frozen=True, slots=True)
class WakeMisses:
    """Misses where each word has the threshold that gives the stated false alarms an hour."""

    misses: Rate
    by_word: dict[str, Rate]
    negative_hours: float  # of the word that has the fewest


def wake_audio(data: Data, split: str, *, snr_db: float | None = None) -> WakeAudio:
    """All speech and noise of the split. With `snr_db`, words and other speech are mixed with its noises."""
    noises = [noise for noise in data.noises if noise.split == split]
    clips = data.split(split)
    words = sorted({clip.label for clip in clips if clip.corpus == WAKE_CORPUS and clip.keyword})

    def send(item: Clip | Recording) -> Upload:
        if snr_db is None or isinstance(item, Recording):
            return as_recorded(item)
        return with_noise(item, noises, snr_db)

    return WakeAudio(words, [*clips, *noises], send)


def listen(client: ServiceClient, plan: WakeAudio) -> list[Found]:
    """What the service finds, recording by recording."""

    def events(item: Clip | Recording) -> Found:
        answer = client.detect(plan.send(item), keywords=plan.words, threshold=CANDIDATE_THRESHOLD, top_k=0)
        found: dict[str, list[float]] = defaultdict(list)
        for event in answer["detections"]:
            found[event["keyword"]].append(event["score"])
        return found

    return client.each(events, plan.audio)


def wake_misses(
    plan: WakeAudio, heard: Sequence[Found], *, per_hour: float, least: float = CANDIDATE_THRESHOLD
) -> WakeMisses:
    """Miss rate at `per_hour` false alarms of each word, on all audio that does not hold it. No threshold lies below
    `least`, from which on scores were given."""
    by_word: dict[str, Rate] = {}
    hours: list[float] = []
    for word in plan.words:
        alarms: list[float] = []
        hits: list[float] = []
        seconds = 0.0
        for item, found in zip(plan.audio, heard, strict=True):
            scores = found.get(word, [])
            if isinstance(item, Clip) and item.corpus == WAKE_CORPUS and item.label == word:
                hits.append(max(scores, default=-np.inf))
            elif not (isinstance(item, Clip) and holds(item, word)):
                alarms.extend(scores)
                seconds += item.duration_s
        hours.append(seconds / 3600)
        threshold = max(threshold_for_false_alarms(np.array(alarms), int(per_hour * hours[-1])), least)
        by_word[word] = rate_of([score < threshold for score in hits])
    misses = Rate(sum(rate.hits for rate in by_word.values()), sum(rate.total for rate in by_word.values()))
    return WakeMisses(misses, by_word, min(hours, default=0.0))


def wake_shipped(plan: WakeAudio, heard: Sequence[Found], thresholds: Mapping[str, float]) -> tuple[WakeMisses, float]:
    """Misses at these thresholds, none of which was read off this audio, and false alarms of a word in an hour."""
    hits: dict[str, list[bool]] = {word: [] for word in plan.words}
    alarms = 0
    hours: dict[str, float] = dict.fromkeys(plan.words, 0.0)
    for item, found in zip(plan.audio, heard, strict=True):
        for word in plan.words:
            passing = sum(score >= thresholds[word] for score in found.get(word, ()))
            if isinstance(item, Clip) and item.corpus == WAKE_CORPUS and item.label == word:
                hits[word].append(not passing)
            elif not (isinstance(item, Clip) and holds(item, word)):
                alarms += passing
                hours[word] += item.duration_s / 3600
    by_word = {word: rate_of(missed) for word, missed in hits.items()}
    misses = Rate(sum(rate.hits for rate in by_word.values()), sum(rate.total for rate in by_word.values()))
    return WakeMisses(misses, by_word, min(hours.values(), default=0.0)), alarms / max(sum(hours.values()), 1e-9)


def holds(clip: Clip, word: str) -> bool:
    """Whether the word, `language:text`, is said somewhere in a clip."""
    language, text = word.split(":", 1)
    if clip.language != language and clip.corpus != "precise":
        return False
    said = f" {clip.keyword} {clip.transcript} ".lower()
    return f" {text} " in said
