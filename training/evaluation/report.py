"""Run the rows that were asked for, and say them as a table and as figures for the manifest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from model_store import Bundle, Metric
from training.errors import MeasurementError
from training.evaluation.client import ServiceClient
from training.evaluation.cost import latencies_ms, multiply_accumulates, streaming_ms
from training.evaluation.peers import pocketsphinx_found, resemblyzer_scores
from training.evaluation.statistics import (
    Rate,
    det_points,
    eer_interval_over_people,
    equal_error_rate,
    interval_over_people,
    minimum_dcf,
    rate_of,
)
from training.evaluation.tasks import (
    COMMAND_CORPORA,
    ENROL_CLIPS,
    LEAST_SPEAKERS,
    Trials,
    Verification,
    clip_accuracy,
    listed_trials,
    plan_trials,
    run_trials,
    spot_misses,
    verification,
)
from training.evaluation.wake import WakeMisses, listen, wake_audio, wake_misses, wake_shipped
from training.manifest import GROUPS, TRIALS, Clip, Data, read_groups, read_trials

# Not among the defaults: `keywords`, which is `asc` and `commands` together, for tables with one column; `base`, which
# takes minutes and no recordings; `trials`, unless the data has a list of them.
ROWS = ("asc", "commands", "wake", "spot", "sv", "cost")
OTHER_ROWS = ("keywords", "base", "trials")
WAKE_SNR_DB = 10.0
WAKE_ALARMS_PER_HOUR = 1.0
# Streams in one call: as many as the service puts there.
TOGETHER = 8
# People of a group that a figure of it needs.
LEAST_OF_GROUP = 3

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number; `value` in percent or as `unit` says."""

    name: str
    value: float
    unit: str
    detail: str = ""


@dataclass(slots=True)
class Report:
    """All figures of one evaluation."""

    model: str
    split: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    # Points of detection error trade-off curves by name: (false-accept rate, miss rate).
    det: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """Of the figure with this name; not a number where it was not measured."""
        return next((figure.value for figure in self.figures if figure.name == name), math.nan)

    def table(self) -> Table:
        table = Table(title=f"{self.model} on {self.split}")
        table.add_column("what", no_wrap=True)
        table.add_column("figure", justify="right", no_wrap=True)
        table.add_column("detail")
        for figure in self.figures:
            table.add_row(figure.name, f"{figure.value:.2f} {figure.unit}", figure.detail)
        return table

    def metrics(self, data: str) -> tuple[Metric, ...]:
        """For the bundle's manifest."""
        return tuple(
            Metric(name=figure.name, value=round(figure.value, 4), unit=figure.unit, data=data, command=self.command)
            for figure in self.figures
            if np.isfinite(figure.value)
        )


def default_rows(data: Data, *, speakers: bool = True) -> tuple[str, ...]:
    """What is measured where nothing was asked for, of a model that tells `speakers` apart or does not."""
    listed = ("trials",) if (data.root / TRIALS).is_file() else ()
    return tuple(row for row in (*ROWS, *listed) if speakers or row not in {"sv", "trials"})


def evaluate(
    client: ServiceClient,
    data: Data,
    *,
    split: str,
    rows: Sequence[str],
    bundle: Bundle | None,
    peers_python: Path,
    command: str,
    say: Say,
) -> Report:
    """Measure `rows` of ROWS through `client`. Raises MeasurementError."""
    model = client.model()
    report = Report(f"{model['name']}@{model['version']}", split, command)
    clips = data.split(split)
    heard: dict[str, str] = {}  # rows share clips
    for row in rows:
        say(f"measuring {row}")
        if row == "asc":
            report.figures += _accuracy("asc", client, [clip for clip in clips if clip.corpus == "asc"], heard)
        elif row == "keywords":
            spoken = [clip for clip in clips if clip.corpus in {"asc", *COMMAND_CORPORA}]
            report.figures += _accuracy("keywords", client, spoken, heard)
        elif row == "commands":
            spoken = [clip for clip in clips if clip.corpus in COMMAND_CORPORA]
            report.figures += _accuracy("commands", client, spoken, heard)
        elif row == "wake":
            report.figures += _wake(client, data, split, peers_python, say)
        elif row == "spot":
            report.figures += _spot(client, data, split)
        elif row == "sv":
            _speakers(report, client, data, peers_python, say)
        elif row == "trials":
            _listed(report, client, data)
        elif row == "cost":
            report.figures += _cost(_itself(row, bundle))
        elif row == "base":
            report.figures += _base(_itself(row, bundle))
        else:
            raise MeasurementError(f"no row {row!r}; there are {', '.join((*ROWS, *OTHER_ROWS))}")
    return report


def _accuracy(name: str, client: ServiceClient, clips: Sequence[Clip], heard: dict[str, str]) -> list[Figure]:
    found = clip_accuracy(client, clips, heard=heard)
    figures = [_share_of_people(f"{name} top-1", found.overall, found.people)]
    if len(found.by_corpus) > 1:
        figures += [_share(f"{name} top-1, {corpus}", rate) for corpus, rate in found.by_corpus.items()]
    people = sorted(rate.value for speaker, rate in found.by_speaker.items() if speaker != "?" and rate.total >= 5)
    if people:
        worst = ", ".join(f"{said} as {heard} ({count})" for said, heard, count in found.confusions[:3])
        detail = f"{len(people)} people, median {np.median(people) * 100:.1f}, best {people[-1] * 100:.1f}; "
        detail += f"most confused: {worst}"
        figures.append(Figure(f"{name} top-1, worst speaker", people[0] * 100, "%", detail))
    return figures


def _wake(client: ServiceClient, data: Data, split: str, peers_python: Path, say: Say) -> list[Figure]:
    figures = []
    beside = True
    thresholds = client.thresholds()
    for label, snr_db in (("clean", None), (f"{WAKE_SNR_DB:g} dB", WAKE_SNR_DB)):
        plan = wake_audio(data, split, snr_db=snr_db)
        heard = listen(client, plan)
        figures.append(_wake_figure(label, wake_misses(plan, heard, per_hour=WAKE_ALARMS_PER_HOUR)))
        shipped, alarms = wake_shipped(plan, heard, thresholds)
        name = f"wake miss at the thresholds that ship, {label}"
        figures.append(Figure(name, shipped.misses.value * 100, "%", _words(shipped)))
        figures.append(Figure(f"wake false alarms at the thresholds that ship, {label}", alarms, "/h", "of one word"))
        # Short audio cannot show one alarm in ten hours: that none was in all of it is the least that can be counted.
        none = wake_misses(plan, heard, per_hour=0.0)
        figures.append(Figure(f"wake miss at no false alarm, {label}", none.misses.value * 100, "%", _words(none)))
        if beside:
            try:
                theirs = pocketsphinx_found(plan, peers_python)
            except MeasurementError as error:
                say(f"  PocketSphinx not measured: {error}")
                beside = False
                continue
            found = wake_misses(plan, theirs, per_hour=WAKE_ALARMS_PER_HOUR, least=0.0)
            figures.append(_wake_figure(f"{label}, PocketSphinx", found))
    return figures


def _wake_figure(label: str, found: WakeMisses) -> Figure:
    return Figure(f"wake miss at {WAKE_ALARMS_PER_HOUR:g}/h, {label}", found.misses.value * 100, "%", _words(found))


def _words(found: WakeMisses) -> str:
    words = ", ".join(f"{word} {rate.value * 100:.1f}" for word, rate in found.by_word.items())
    return f"{_interval(found.misses)}; {found.negative_hours:.2f} h of other audio; {words}"


def _spot(client: ServiceClient, data: Data, split: str) -> list[Figure]:
    found = spot_misses(client, data.split(split))
    words = ", ".join(f"{word} {rate.value * 100:.1f}" for word, rate in found.by_word.items())
    figures = [_share_of_people("spot miss", found.misses, list(found.by_speaker.values()), words)]
    for group, people in _groups(data, found.by_speaker).items():
        own = [found.by_speaker[speaker] for speaker in people]
        missed = Rate(sum(rate.hits for rate in own), sum(rate.total for rate in own))
        figures.append(_share_of_people(f"spot miss, {group}", missed, own))
    return [
        *figures,
        Figure("spot false alarms", found.false_alarms_per_hour, "/h", "of the five words, in the same sentences"),
    ]


def _speakers(report: Report, client: ServiceClient, data: Data, peers_python: Path, say: Say) -> None:
    plans = plan_trials(data.split(report.split))
    if not plans:
        raise MeasurementError(
            f"no corpus has {LEAST_SPEAKERS} speakers with more than {ENROL_CLIPS} clips in {report.split}"
        )
    for plan in plans:
        say(f"  {plan.corpus}: {len(plan.speakers)} speakers, {len(plan.tests)} tests")
        run_trials(client, plan)
    own = verification(plans, [plan.llr for plan in plans])
    figures = _verification("sv", plans, own, calibrated=True)
    low, high = eer_interval_over_people([list(plan.by_person(plan.llr).values()) for plan in plans])
    people = sum(len(plan.speakers) for plan in plans)
    interval = f"; 95 % interval over {people} people {low * 100:.1f} to {high * 100:.1f}"
    figures[0] = replace(figures[0], detail=figures[0].detail + interval)
    for plan in plans:
        tests = plan.by_person(plan.llr)
        for group, members in _groups(data, tests).items():
            scores = (np.concatenate(each) for each in zip(*(tests[name] for name in members), strict=True))
            detail = f"{len(members)} people, claims of all {len(tests)}"
            figures.append(Figure(f"sv EER, {plan.corpus}, {group}", equal_error_rate(*scores) * 100, "%", detail))
    figures += _strict(plans, client.operating_points())
    plain = verification(plans, [plan.cosine for plan in plans])
    figures += _verification("sv, cosine", plans, plain, calibrated=False)[:1]
    report.det |= {"sv": own.det, "sv, cosine": plain.det}
    refused = sum(plan.refused_clips for plan in plans)
    unenrolled = sum(len(plan.unenrolled) for plan in plans)
    detail = f"of genuine speakers; {unenrolled} of {sum(len(plan.speakers) for plan in plans)} profiles incomplete"
    figures.append(Figure("sv enrolment clips refused", refused, "clips", detail))
    report.figures += figures
    try:
        peer = resemblyzer_scores(plans, peers_python)
    except MeasurementError as error:
        say(f"  Resemblyzer not measured: {error}")
        return
    theirs = verification(plans, peer)
    report.figures += _verification("sv, Resemblyzer", plans, theirs, calibrated=False)
    report.det["sv, Resemblyzer"] = theirs.det


def _listed(report: Report, client: ServiceClient, data: Data) -> None:
    found = listed_trials(client, read_trials(data.root))
    scores = found.targets, found.impostors
    detail = f"{len(found.targets)} target and {len(found.impostors)} impostor pairs of {TRIALS}, cosine; "
    detail += f"no speech heard in {found.unheard} of {found.recordings} recordings"
    report.figures += [
        Figure("trials EER", equal_error_rate(*scores) * 100, "%", detail),
        Figure("trials minDCF(0.01)", minimum_dcf(*scores), ""),
        # VoxCeleb's challenges report this one.
        Figure("trials minDCF(0.05)", minimum_dcf(*scores, p_target=0.05), ""),
    ]
    report.det["trials"] = det_points(*scores)


def _verification(name: str, plans: Sequence[Trials], found: Verification, *, calibrated: bool) -> list[Figure]:
    trials = f"{found.targets} target and {found.impostors} impostor trials, {len(plans)} corpora"
    figures = [Figure(f"{name} EER", found.eer * 100, "%", trials)]
    figures += [Figure(f"{name} EER, {corpus}", eer * 100, "%") for corpus, eer in found.eer_by_corpus.items()]
    figures.append(Figure(f"{name} minDCF(0.01)", found.min_dcf, ""))
    if calibrated:
        figures.append(Figure(f"{name} Cllr", found.cllr, "bit"))
        figures.append(_share(f"{name} false rejects at 0", found.false_rejects))
        figures.append(_share(f"{name} false accepts at 0", found.false_accepts))
    return figures


def _strict(plans: Sequence[Trials], operating_points: Mapping[float, float]) -> list[Figure]:
    """How often strangers are accepted, and people refused, where `false_accept_rate` is asked for."""
    parts = [plan.split(plan.llr) for plan in plans]
    targets, impostors = (np.concatenate(each) for each in zip(*parts, strict=True))
    figures = []
    for rate, threshold in sorted(operating_points.items(), reverse=True):
        where = f"where {rate * 100:g} % are asked for"
        figures.append(_share(f"sv false accepts {where}", rate_of(list(impostors >= threshold))))
        figures.append(_share(f"sv false rejects {where}", rate_of(list(targets < threshold))))
    return figures


def _itself(row: str, bundle: Bundle | None) -> Bundle:
    """What can only be measured beside the service."""
    if bundle is None:
        raise MeasurementError(f"{row} needs the bundle itself: give it beside --url, or leave the row out")
    return bundle


def _cost(bundle: Bundle) -> list[Figure]:
    graph = bundle.read(bundle.manifest.graph.file)
    latency = latencies_ms({"": graph})[""]
    return [
        Figure("one second of audio, one thread", latency.one_thread, "ms", "ONNX Runtime, median of 300 runs"),
        Figure("one second of audio, all threads", latency.all_threads, "ms", f"{latency.threads} threads"),
        *_streaming(bundle),
        Figure("multiply-accumulates", multiply_accumulates(graph) / 1e6, "M", "for one second of audio"),
        Figure("parameters", bundle.manifest.graph.parameters / 1e6, "M", "no training-only heads are in the graph"),
        Figure("graph file", bundle.manifest.files[bundle.manifest.graph.file].size / 1e6, "MB"),
    ]


def _streaming(bundle: Bundle) -> list[Figure]:
    if bundle.manifest.stream is None:
        return []
    figures = []
    for name, streams in (("one second of a stream", 1), (f"one second of a stream, {TOGETHER} in a call", TOGETHER)):
        stream, clip = streaming_ms(bundle, streams)
        detail = f"in chunks of 250 ms; {stream / clip:.2f} times the keywords of a clip, {clip:.2f} ms in the same run"
        figures.append(Figure(f"{name}, one thread", stream, "ms", detail))
    return figures


def _base(bundle: Bundle) -> list[Figure]:
    # Imports transformers.
    from training.evaluation.beside_base import beside_base

    found = beside_base(bundle)
    sizes = f"{found.own_bytes / 1e6:.2f} of {found.base_bytes / 1e6:.0f} MB, {found.parameters / 1e6:.1f} M parameters"
    times = (
        f"{found.own.one_thread:.2f} of {found.base.one_thread:.0f} ms on one thread, "
        f"{found.own.all_threads:.2f} of {found.base.all_threads:.0f} ms on {found.own.threads}"
    )
    return [
        Figure("smaller than HuBERT Base with the same heads", found.smaller * 100, "%", sizes),
        Figure("faster than HuBERT Base with the same heads", found.faster * 100, "%", times),
    ]


def _share(name: str, rate: Rate, detail: str = "") -> Figure:
    return Figure(name, rate.value * 100, "%", "; ".join(part for part in (_interval(rate), detail) if part))


def _share_of_people(name: str, rate: Rate, people: Sequence[Rate], detail: str = "") -> Figure:
    """`people` are those whose outcomes `rate` counts."""
    low, high = interval_over_people(people)
    interval = f"95 % interval over {len(people)} people {low * 100:.1f} to {high * 100:.1f}, n = {rate.total}"
    return Figure(name, rate.value * 100, "%", "; ".join(part for part in (interval, detail) if part))


def _groups(data: Data, speakers: Iterable[str]) -> dict[str, list[str]]:
    """Groups with as many of these speakers as a figure needs, where there is more than one: "gender female"."""
    told = read_groups(data.root)
    found: dict[str, list[str]] = {}
    for kind in GROUPS:
        own: dict[str, list[str]] = defaultdict(list)
        for speaker in sorted(speakers):
            if value := told.get(speaker, {}).get(kind):
                own[f"{kind} {value}"].append(speaker)
        enough = {group: people for group, people in sorted(own.items()) if len(people) >= LEAST_OF_GROUP}
        found |= enough if len(enough) > 1 else {}
    return found


def _interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"95 % interval {low * 100:.1f} to {high * 100:.1f}, n = {rate.total}"
