"""Fit what a draft bundle decides with: keyword thresholds, smoothing window, score calibration.

Only the calibration fold is used: training speakers that the network never saw, none of `dev`. The
draft is served and asked through HTTP, so that what is fitted is exactly what will be compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from model_store import Bundle, Calibration, Keyword, Manifest, OperatingPoint, SpeakerInfo
from model_store.store import MANIFEST, open_bundle
from training.errors import TrainingError
from training.evaluation.client import ServiceClient, served
from training.evaluation.recordings import as_recorded
from training.evaluation.statistics import (
    cllr,
    equal_error_rate,
    fit_calibration,
    threshold_for_false_alarms,
)
from training.evaluation.tasks import TURNED_AWAY, clip_accuracy, plan_trials, run_trials
from training.evaluation.wake import holds
from training.export import COHORT, COHORT_CLIPS, UNFITTED, export, write_draft
from training.finished import name_of, origin
from training.manifest import CALIBRATION_FOLD, Clip, Data, Recording

WINDOWS_S = (0.6, 1.0, 1.6)
# A shorter window parts neighbouring words better; a difference below this is chance on our fold.
ACCURACY_TOLERANCE = 0.002
# Of some 290 training speakers; fewer are closer, more are steadier.
COHORT_TOPS = (20, 100)
# False alarms of one keyword an hour that the thresholds aim at.
BUDGET_PER_HOUR = 1.0
# A score is a probability: below one half the model itself holds that nothing was said. Above the upper
# bound a threshold would be fitted to a handful of accidents.
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 0.5, 0.9
CANDIDATE_THRESHOLD = 0.1
# For which thresholds stricter than even odds are kept.
FALSE_ACCEPT_RATES = (0.01, 0.001)

TASKS = ("keywords", "speakers")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _SpeakerFit:
    scale: float
    offset: float
    with_cohort: bool
    cost: float
    note: str
    operating_points: tuple[OperatingPoint, ...]


def bundle_of(run: Path, data_root: Path, *, say: Say, fitted: bool = True, timed_only: bool = False) -> Bundle:
    """The draft in `run`/bundle of a finished run; exported and calibrated (`fitted`) where that has not been done. In
    `run`/timed what is `timed_only`, and compares nobody with its cohort: of a large network that would take an hour.

    A run of one task is left uncalibrated: there is nothing to fit the other task's part on. Raises
    TrainingError.
    """
    draft = run / ("timed" if timed_only else "bundle")
    if not (draft / MANIFEST).is_file():
        with TemporaryDirectory(dir=run) as work:
            fresh = Path(work) / "bundle"
            say(f"exporting {run}")
            name, clips = f"sotto-{name_of(run)}", 1 if timed_only else COHORT_CLIPS
            manifest = export(run, fresh, name=name, data_root=data_root, cohort_clips=clips)
            if fitted and _can_be_fitted(manifest):
                calibrate(fresh, data_root=data_root, say=say)
            fresh.replace(draft)
        return open_bundle(draft)
    bundle = open_bundle(draft)
    # It may have been exported for a comparison.
    if fitted and _can_be_fitted(bundle.manifest) and _is_unfitted(bundle.manifest):
        calibrate(draft, data_root=data_root, say=say)
        return open_bundle(draft)
    return bundle


def _can_be_fitted(manifest: Manifest) -> bool:
    return manifest.speaker is None or len(manifest.lineage.recipe.get("tasks", TASKS)) == len(TASKS)


def _is_unfitted(manifest: Manifest) -> bool:
    # Speakers are fitted last.
    fitted_on = (
        manifest.keywords.thresholds_from if manifest.speaker is None else manifest.speaker.calibration.fitted_on
    )
    return fitted_on.startswith(UNFITTED)


def calibrate(draft: Path, *, data_root: Path | None, say: Say) -> Manifest:
    """Rewrite the manifest of the draft in place and return it. Raises TrainingError."""
    manifest = open_bundle(draft).manifest
    source = origin(manifest.lineage.recipe)
    data = source.read(data_root)
    fold = data.split(CALIBRATION_FOLD)
    if not fold:
        raise TrainingError("the recipe sets no speakers aside (its calibration fraction is 0)")
    manifest = _uncalibrated(manifest)
    manifest = _with_window(manifest, _best_window(draft, manifest, fold, say))
    with _serving(draft, manifest) as client:
        thresholds, capped = _thresholds(client, manifest, data, fold, say)
    people = len({clip.speaker for clip in fold if clip.speaker})
    fitted_on = (
        f"{people} training speakers set aside (fold {CALIBRATION_FOLD!r}, seed {source.seed}), {len(fold)} clips"
    )
    keywords = manifest.keywords.model_copy(
        update={
            "labels": tuple(
                Keyword(label=entry.label, threshold=thresholds[entry.label], typical_s=entry.typical_s)
                for entry in manifest.keywords.labels
            ),
            "thresholds_from": f"{BUDGET_PER_HOUR:g} false alarm an hour and keyword on {fitted_on}{_beyond(capped)}",
        }
    )
    changes: dict[str, object] = {"keywords": keywords}
    if manifest.speaker is not None:
        changes["speaker"] = _fitted_speaker(draft, manifest, manifest.speaker, fold, fitted_on, say)
    manifest = manifest.model_copy(update=changes)
    _write(draft, manifest)
    return manifest


def _fitted_speaker(
    draft: Path, manifest: Manifest, info: SpeakerInfo, fold: list[Clip], fitted_on: str, say: Say
) -> SpeakerInfo:
    cohort_top, fit = _best_cohort(draft, manifest, info, fold, say)
    return info.model_copy(
        update={
            "calibration": Calibration(scale=fit.scale, offset=fit.offset, fitted_on=f"{fitted_on}: {fit.note}"),
            "cohort_file": info.cohort_file if fit.with_cohort else None,
            "cohort_top": cohort_top,
            "operating_points": fit.operating_points,
        }
    )


def _uncalibrated(manifest: Manifest) -> Manifest:
    """Scores as they come: raw normalised scores, so that fitting twice gives the same."""
    if manifest.speaker is None:
        return manifest
    cohort = COHORT if COHORT in manifest.files else None
    raw = Calibration(scale=1.0, offset=0.0, fitted_on=UNFITTED)
    speaker = manifest.speaker.model_copy(
        update={"calibration": raw, "cohort_file": cohort, "threshold": 0.0, "operating_points": ()}
    )
    return manifest.model_copy(update={"speaker": speaker})


def _best_window(draft: Path, manifest: Manifest, fold: list[Clip], say: Say) -> float:
    """The shortest smoothing window of (almost) the highest clip accuracy, each corpus weighing the same."""
    clips = [clip for clip in fold if clip.keyword and "sentence" not in clip.key]
    accuracies = {}
    for window_s in WINDOWS_S:
        with _serving(draft, _with_window(manifest, window_s)) as client:
            accuracy = clip_accuracy(client, clips)
        mean = float(np.mean([rate.value for rate in accuracy.by_corpus.values()]))
        each = ", ".join(f"{name} {rate.value:.3f}" for name, rate in accuracy.by_corpus.items())
        say(f"window {window_s} s: mean accuracy {mean:.4f} ({each})")
        accuracies[window_s] = mean
    enough = max(accuracies.values()) - ACCURACY_TOLERANCE
    return min(window_s for window_s, mean in accuracies.items() if mean >= enough)


def _best_cohort(
    draft: Path, manifest: Manifest, info: SpeakerInfo, fold: list[Clip], say: Say
) -> tuple[int, _SpeakerFit]:
    """How many of the closest cohort speakers normalise a score, if any; the cheapest fit (Cllr) wins."""
    fits = []
    for top in COHORT_TOPS:
        speaker = info.model_copy(update={"cohort_top": top})
        with _serving(draft, manifest.model_copy(update={"speaker": speaker})) as client:
            say(f"closest {top} of the cohort")
            fits.append((top, _fit_speakers(client, fold, say)))
    return min(fits, key=lambda fit: fit[1].cost)


def _beyond(capped: list[str]) -> str:
    return f"; {', '.join(capped)} would need more than {HIGHEST_THRESHOLD}" if capped else ""


def _thresholds(
    client: ServiceClient, manifest: Manifest, data: Data, fold: list[Clip], say: Say
) -> tuple[dict[str, float], list[str]]:
    """For each keyword the lowest threshold that keeps to the budget on the fold's other speech and on the
    training noises, within bounds; and those that the upper bound keeps from it."""
    noises = [noise for noise in data.noises if noise.split == "train"]
    audio: list[Clip | Recording] = [*fold, *noises]
    answers = client.each(
        lambda item: client.detect(as_recorded(item), threshold=CANDIDATE_THRESHOLD, top_k=0)["detections"], audio
    )
    alarms: dict[str, list[float]] = defaultdict(list)
    for item, events in zip(audio, answers, strict=True):
        for event in events:
            if not (isinstance(item, Clip) and holds(item, event["keyword"])):
                alarms[event["keyword"]].append(event["score"])
    hours = sum(item.duration_s for item in audio) / 3600
    allowed = int(BUDGET_PER_HOUR * hours)
    found, capped = {}, []
    for entry in manifest.keywords.labels:
        wanted = threshold_for_false_alarms(np.array(alarms[entry.label]), allowed)
        if wanted > HIGHEST_THRESHOLD:
            capped.append(entry.label)
        # Up to the next thousandth: rounding down would let an alarm over the budget through.
        found[entry.label] = min(max(math.ceil(wanted * 1000) / 1000, LOWEST_THRESHOLD), HIGHEST_THRESHOLD)
    raised = sum(value > LOWEST_THRESHOLD for value in found.values())
    say(f"thresholds: {hours:.2f} h of other audio, {allowed} alarms allowed, {raised} above {LOWEST_THRESHOLD}")
    return found, capped


def _fit_speakers(client: ServiceClient, fold: list[Clip], say: Say) -> _SpeakerFit:
    """Calibrate both the cohort-normalised score and the plain cosine; keep what costs less (Cllr)."""
    plans = plan_trials(fold, least_speakers=2)
    if not plans:
        raise TrainingError("no corpus has two set-aside speakers with more than six clips: nothing to calibrate on")
    for plan in plans:
        run_trials(client, plan)
    fits = []
    for with_cohort, turned_away in zip((True, False), TURNED_AWAY, strict=True):
        parts = [plan.split(plan.llr if with_cohort else plan.cosine) for plan in plans]
        # Claims that the service turned away have no score: as targets they would bend the map, and as impostors make
        # strangers seem rarer than they are.
        targets, impostors = (
            scores[scores > turned_away] for scores in (np.concatenate(each) for each in zip(*parts, strict=True))
        )
        if not (len(targets) and len(impostors)):
            raise TrainingError("the service turned every claim away: nothing to calibrate on")
        scale, offset = fit_calibration(targets, impostors)
        cost = cllr(scale * targets + offset, scale * impostors + offset)
        eer = equal_error_rate(targets, impostors)
        kind = "cohort-normalised" if with_cohort else "cosine"
        note = f"{kind}, {len(targets)} target and {len(impostors)} impostor trials, EER {eer:.4f}, Cllr {cost:.4f}"
        say(note)
        if scale > 0:
            strict = _operating_points(scale * impostors + offset)
            fits.append(_SpeakerFit(scale, offset, with_cohort, cost, note, strict))
    if not fits:
        raise TrainingError("impostors score higher than the speakers themselves: this network tells nobody apart")
    return min(fits, key=lambda fit: fit.cost)


def _operating_points(impostors: npt.NDArray[np.float64]) -> tuple[OperatingPoint, ...]:
    """Of impostors' log-likelihood ratios, the thresholds that so small shares of them reach, never laxer than even
    odds; none where there are too few for one false accept to be expected."""
    return tuple(
        # Up to the next thousandth, so that rounding lets nobody in.
        OperatingPoint(
            false_accept_rate=rate,
            threshold=max(
                0.0, math.ceil(threshold_for_false_alarms(impostors, int(rate * len(impostors))) * 1000) / 1000
            ),
        )
        for rate in FALSE_ACCEPT_RATES
        if rate * len(impostors) >= 1
    )


def _with_window(manifest: Manifest, window_s: float) -> Manifest:
    keywords = manifest.keywords.model_copy(update={"window_s": window_s})
    return manifest.model_copy(update={"keywords": keywords})


def _serving(draft: Path, manifest: Manifest) -> AbstractContextManager[ServiceClient]:
    _write(draft, manifest)
    return served(draft)


def _write(draft: Path, manifest: Manifest) -> None:
    write_draft(draft, manifest, {})
