"""The recognition rows of the design's `measuring.md`, each measured through HTTP."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from training.evaluation.client import ServiceClient, Upload
from training.evaluation.recordings import as_recorded, beginning
from training.evaluation.statistics import (
    Rate,
    cllr,
    det_points,
    equal_error_rate,
    minimum_dcf,
    rate_of,
)
from training.manifest import Clip, Recording, Trial

SPOT_CORPUS = "wuw2"
COMMAND_CORPORA = ("gsc", "fsdd", "dsp20")
ENROL_CLIPS = 6
# Each speaker counts by at most this many tests, lest one person with 250 calls outvote all others.
MOST_TESTS_PER_SPEAKER = 60
LEAST_SPEAKERS = 4
SPOT_TOLERANCE_S = 0.5
# Some VoxCeleb recordings last longer than the service takes at once; whoever speaks so long is known by then.
LONGEST_TRIAL_S = 60.0
# (log-likelihood ratio, cosine) of a claim that is refused without scoring.
TURNED_AWAY = (-50.0, -1.0)

Sender = Callable[[Clip | Recording], Upload]


@dataclass(frozen=True, slots=True)
class ClipAccuracy:
    """Top-1 over all labels of the model."""

    overall: Rate
    by_corpus: dict[str, Rate]
    by_speaker: dict[str, Rate]
    # Of everyone; a clip whose speaker is not known stands for a person.
    people: list[Rate]
    confusions: list[tuple[str, str, int]]


@dataclass(frozen=True, slots=True)
class SpotMisses:
    """At the thresholds that ship: misses, and false alarms of these words in the same sentences."""

    misses: Rate
    by_word: dict[str, Rate]
    by_speaker: dict[str, Rate]
    false_alarms_per_hour: float


@dataclass(slots=True)
class Trials:
    """Verification scores of one corpus, and the recordings behind them for a peer to score."""

    corpus: str
    enrolments: dict[str, list[Clip]] = field(default_factory=dict)
    tests: list[tuple[str, Clip]] = field(default_factory=list)
    refused_clips: int = 0
    unenrolled: set[str] = field(default_factory=set)
    # Row: test. Column: claimed speaker, in the order of `speakers`.
    llr: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    cosine: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def speakers(self) -> list[str]:
        return sorted(self.enrolments)

    def split(self, scores: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(target, impostor) scores of a matrix shaped like `llr`."""
        own = np.array([[speaker == name for name in self.speakers] for speaker, _ in self.tests])
        return scores[own], scores[~own]

    def by_person(
        self, scores: npt.NDArray[np.float64]
    ) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """The same for each who speaks in a test."""
        found = {}
        for column, name in enumerate(self.speakers):
            rows = scores[[speaker == name for speaker, _ in self.tests]]
            found[name] = rows[:, column], np.delete(rows, column, axis=1).ravel()
        return found


@dataclass(frozen=True, slots=True)
class PairScores:
    """Cosines of listed pairs."""

    targets: npt.NDArray[np.float64]
    impostors: npt.NDArray[np.float64]
    recordings: int
    unheard: int


@dataclass(frozen=True, slots=True)
class Verification:
    """Error rates over the trials of several corpora; impostors come from the same corpus only."""

    eer: float
    eer_by_corpus: dict[str, float]
    min_dcf: float
    cllr: float
    targets: int
    impostors: int
    false_rejects: Rate
    false_accepts: Rate
    det: list[tuple[float, float]]  # (false-accept rate, miss rate)


def clip_accuracy(
    client: ServiceClient, clips: Sequence[Clip], send: Sender = as_recorded, heard: dict[str, str] | None = None
) -> ClipAccuracy:
    """Rank every clip that is one keyword. `heard`, by a clip's key, is not asked for again, and filled."""
    known = set(client.keywords())
    clips = [clip for clip in clips if clip.label in known]
    heard = {} if heard is None else heard
    fresh = [clip for clip in clips if clip.key not in heard]
    found = client.each(lambda clip: client.detect(send(clip), top_k=1)["top"][0]["keyword"], fresh)
    heard |= {clip.key: label for clip, label in zip(fresh, found, strict=True)}
    by_corpus: dict[str, list[bool]] = defaultdict(list)
    by_speaker: dict[str, list[bool]] = defaultdict(list)
    confusions: dict[tuple[str, str], int] = defaultdict(int)
    for clip in clips:
        right = heard[clip.key] == clip.label
        by_corpus[clip.corpus].append(right)
        by_speaker[clip.speaker or "?"].append(right)
        if not right:
            confusions[clip.label, heard[clip.key]] += 1
    worst = sorted(confusions.items(), key=lambda item: -item[1])[:10]
    unknown = by_speaker.get("?", [])
    known_people = [rate_of(rights) for name, rights in by_speaker.items() if name != "?"]
    return ClipAccuracy(
        people=[*known_people, *(rate_of([right]) for right in unknown)],
        overall=rate_of([right for rights in by_corpus.values() for right in rights]),
        by_corpus={name: rate_of(rights) for name, rights in sorted(by_corpus.items())},
        by_speaker={name: rate_of(rights) for name, rights in sorted(by_speaker.items())},
        confusions=[(said, label, count) for (said, label), count in worst],
    )


def spot_misses(client: ServiceClient, clips: Sequence[Clip]) -> SpotMisses:
    """Words inside telephone sentences, found at the thresholds that ship."""
    sentences = [
        clip
        for clip in clips
        if clip.corpus == SPOT_CORPUS and clip.keyword and "sentence" in clip.key and clip.word_start_s is not None
    ]
    words = sorted({clip.label for clip in sentences})
    answers = client.each(lambda clip: client.detect(as_recorded(clip), keywords=words)["detections"], sentences)
    missed: dict[str, list[bool]] = defaultdict(list)
    missed_of: dict[str, list[bool]] = defaultdict(list)
    alarms = 0
    for clip, found in zip(sentences, answers, strict=True):
        right = [event for event in found if event["keyword"] == clip.label and _near(event, clip)]
        missed[clip.label].append(not right)
        missed_of[clip.speaker].append(not right)
        alarms += len(found) - len(right)
    hours = sum(clip.duration_s for clip in sentences) / 3600
    return SpotMisses(
        misses=rate_of([miss for misses in missed.values() for miss in misses]),
        by_word={word: rate_of(misses) for word, misses in sorted(missed.items())},
        by_speaker={name: rate_of(misses) for name, misses in sorted(missed_of.items())},
        false_alarms_per_hour=alarms / hours if hours else 0.0,
    )


def plan_trials(clips: Sequence[Clip], *, least_speakers: int = LEAST_SPEAKERS) -> list[Trials]:
    """For each corpus with enough speakers: six enrolment clips a speaker, the others are tests.

    Which clips enrol is decided by a hash of their path, so words and sessions are mixed and the choice
    never changes.
    """
    by_corpus: dict[str, dict[str, list[Clip]]] = defaultdict(lambda: defaultdict(list))
    for clip in clips:
        if clip.speaker:
            by_corpus[clip.corpus][clip.speaker].append(clip)
    plans = []
    for corpus, speakers in sorted(by_corpus.items()):
        enough = {name: own for name, own in speakers.items() if len(own) > ENROL_CLIPS}
        if len(enough) < least_speakers:
            continue
        trials = Trials(corpus)
        for name, own in sorted(enough.items()):
            ordered = sorted(own, key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
            trials.enrolments[name] = ordered[:ENROL_CLIPS]
            trials.tests += [(name, clip) for clip in ordered[ENROL_CLIPS:][:MOST_TESTS_PER_SPEAKER]]
        plans.append(trials)
    return plans


def run_trials(client: ServiceClient, trials: Trials, send: Sender = as_recorded) -> None:
    """Enrol every speaker with recordings as they are, score every test, as `send` disturbs it, against
    everyone, delete the speakers; fills `trials`.

    What the service would turn away scores as low as can be: a test in which it hears no speech, and any
    claim to be a speaker whose six clips do not complete a profile.
    """
    ids = {name: f"evaluation-{trials.corpus}-{name}" for name in trials.speakers}
    try:
        for name, speaker_id in ids.items():
            client.delete(speaker_id)
            answer = client.enrol(speaker_id, [as_recorded(clip) for clip in trials.enrolments[name]])
            trials.refused_clips += sum(not clip["accepted"] for clip in answer["clips"])
            if answer["status"] != "enrolled":
                trials.unenrolled.add(name)

        enrolled = [ids[name] for name in trials.speakers if name not in trials.unenrolled]

        def row(test: tuple[str, Clip]) -> list[tuple[float, float]]:
            found = client.compare(send(test[1]), enrolled) or {}
            answers = [found.get(ids[name]) for name in trials.speakers]
            return [TURNED_AWAY if one is None else (one["score"], one["cosine"]) for one in answers]

        scores = np.array(client.each(row, trials.tests), dtype=np.float64)
        trials.llr, trials.cosine = scores[:, :, 0], scores[:, :, 1]
    finally:
        for speaker_id in ids.values():
            client.delete(speaker_id)


def verification(plans: Sequence[Trials], matrices: Sequence[npt.NDArray[np.float64]]) -> Verification:
    """Pool the trials of all corpora; `matrices` are scores shaped like each plan's `llr`."""
    parts = [plan.split(matrix) for plan, matrix in zip(plans, matrices, strict=True)]
    targets = np.concatenate([part[0] for part in parts])
    impostors = np.concatenate([part[1] for part in parts])
    return Verification(
        eer=equal_error_rate(targets, impostors),
        eer_by_corpus={plan.corpus: equal_error_rate(*part) for plan, part in zip(plans, parts, strict=True)},
        min_dcf=minimum_dcf(targets, impostors),
        cllr=cllr(targets, impostors),
        targets=len(targets),
        impostors=len(impostors),
        false_rejects=rate_of(list(targets < 0)),
        false_accepts=rate_of(list(impostors >= 0)),
        det=det_points(targets, impostors),
    )


def listed_trials(client: ServiceClient, trials: Sequence[Trial]) -> PairScores:
    """Cosines between embeddings of whole recordings, as VoxCeleb's lists are scored.

    A pair in which the service hears no speech scores as low as can be.
    """
    paths = sorted({path for trial in trials for path in (trial.enrolment, trial.test)})
    found = client.each(lambda path: client.speaker_embedding(beginning(path, LONGEST_TRIAL_S)), paths)
    unit = {
        path: np.array(vector) / np.linalg.norm(vector)
        for path, vector in zip(paths, found, strict=True)
        if vector is not None
    }
    cosines = np.array(
        [
            float(unit[trial.enrolment] @ unit[trial.test]) if {trial.enrolment, trial.test} <= unit.keys() else -1.0
            for trial in trials
        ]
    )
    own = np.array([trial.target for trial in trials])
    return PairScores(cosines[own], cosines[~own], len(paths), len(paths) - len(unit))


def _near(event: dict[str, float], clip: Clip) -> bool:
    centre_s = (event["start_s"] + event["end_s"]) / 2
    start_s, end_s = clip.word_start_s or 0.0, clip.word_end_s or 0.0
    return start_s - SPOT_TOLERANCE_S <= centre_s <= end_s + SPOT_TOLERANCE_S
