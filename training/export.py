"""A finished run -> an unpublished bundle, with proof that the graph is the network.

The draft's scores are uncalibrated (scale 1, offset 0) and its thresholds are placeholders; `sotto
calibrate` fits them on the calibration fold.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model_store import (
    AudioLimits,
    Calibration,
    EmbeddingInfo,
    GraphInfo,
    Keyword,
    KeywordInfo,
    Manifest,
    SpeakerInfo,
    StreamInfo,
)
from model_store.files import describe
from model_store.golden import pack
from model_store.graph import OUTPUTS, SPEAKER, part_of
from model_store.inference import Session, open_session
from model_store.store import MANIFEST
from model_store.streaming import StreamingGraph
from training.alignment import loudest_speech
from training.audio_cache import SAMPLE_RATE_HZ, decode
from training.errors import ExportError
from training.finished import Finished, open_run, origin
from training.layout import in_two_dimensions, keep_blocked
from training.manifest import Clip, labels_of
from training.students.edge import FRAME_HOP, FRAME_STRIDE, STEM_STRIDE, Edge, is_convolutional
from training.students.frontend import HOP
from training.students.streaming import StreamingEdge
from training.teachers import SelfSupervised

OPSET = 17
TOLERANCE = 1e-4
SHORTEST_S = 0.1
LONGEST_S = 120.0
PLACEHOLDER_THRESHOLD = 0.5
# What a calibration that has not been fitted, or not to the end, says it was fitted on.
UNFITTED = "nothing"
COHORT = "cohort.f32"
STREAM = "stream.onnx"
# One word's worth of audio: long enough for the longest keyword, short enough to part two of them.
WINDOW_S = 1.0
REFRACTORY_S = 0.8
COHORT_CLIPS = 20
# A streaming graph that looks further ahead would tell a word later than sliding windows do.
LONGEST_DELAY_S = 0.75

Array = npt.NDArray[np.float32]


class ServedGraph(nn.Module):
    """The student's outputs as the bundle's contract names them; the mask stays inside."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        # A student without a speaker branch has no such output.
        alone = isinstance(student, Edge) and not student.shape.tells_speakers
        self.names = tuple(name for name in OUTPUTS if name != SPEAKER or not alone)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        out = self.student(waveform, lengths)
        return tuple(getattr(out, name) for name in self.names)


def export(
    run_folder: Path, out: Path, *, name: str, data_root: Path | None = None, cohort_clips: int = COHORT_CLIPS
) -> Manifest:
    """Write the draft bundle into `out` and return its manifest; the cohort has so many clips of each speaker. Raises
    RunError, ExportError."""
    finished = open_run(run_folder)
    source = origin(finished.lineage.recipe)
    data = source.read(data_root)
    network = finished.network
    graph = graph_of(network)
    session = open_session(graph, threads=1)
    check_graph_equals_network(session, network)
    trained_on = source.choose(data.split("train"))
    golden_clip = _golden_waveform()
    given = run_graph(session, [golden_clip], ServedGraph(network).names)
    files = {
        "model.onnx": graph,
        "golden.npz": pack(golden_clip, {key: value[0] for key, value in given.items()}),
        "MODEL_CARD.md": f"# {name}\n\nUncalibrated draft.\n".encode(),
    }
    stream, streaming = None, None
    if is_convolutional(network):
        streaming = StreamingEdge(network).eval()
    if streaming is not None and streaming.delay * finished.frame_hop_s <= LONGEST_DELAY_S:
        stream = StreamInfo(file=STREAM, delay_frames=streaming.delay, state_size=streaming.state_size)
        files[STREAM] = traced_stream(streaming)
        check_stream_equals_clip(StreamingGraph(open_session(files[STREAM], threads=1), stream, hop=FRAME_HOP), session)
    if finished.speaker_dim:
        # Of a large network speakers are often a small part.
        voices = open_session(part_of(graph, [SPEAKER]), threads=1)
        cohort = speaker_cohort(voices, [clip for clip in trained_on if clip.speaker], cohort_clips)
        files[COHORT] = cohort.astype("<f4").tobytes()
    manifest = _manifest(name, finished, trained_on, files, stream)
    write_draft(out, manifest, files)
    return manifest


def graph_of(network: nn.Module) -> bytes:
    """What a finished run's network (`open_run`) is served as."""
    return to_onnx(network) if is_convolutional(network) else in_two_dimensions(traced(network))


def to_onnx(student: Edge) -> bytes:
    """The graph that ships: as traced, in the layout that ONNX Runtime computes in."""
    strides = {"hops": 1, "steps": STEM_STRIDE, "frames": FRAME_STRIDE}
    return keep_blocked(traced(student), hop=HOP, strides=strides)


def traced(student: nn.Module) -> bytes:
    """The graph as torch writes it, batch and samples dynamic, batch norms folded into convolutions."""
    served = ServedGraph(student).eval()
    waveform = torch.zeros(2, SAMPLE_RATE_HZ)
    lengths = torch.tensor([SAMPLE_RATE_HZ, SAMPLE_RATE_HZ // 2])
    axes = {"waveform": "samples", "keyword_logits": "frames", "frames": "frames"}
    trunk = getattr(student, "trunk", None)
    with trunk.plain_attention() if isinstance(trunk, SelfSupervised) else nullcontext():
        return _to_onnx(served, {"waveform": waveform, "lengths": lengths}, served.names, axes)


def traced_stream(streaming: StreamingEdge) -> bytes:
    """The streaming graph (model_store/streaming.py), batch and frames dynamic."""
    given = {
        "samples": torch.zeros(2, 3 * FRAME_HOP),
        "position": torch.zeros(2, dtype=torch.int64),
        "length": torch.full((2,), SAMPLE_RATE_HZ),
        "state": torch.zeros(2, streaming.state_size),
    }
    axes = {"samples": "samples", "keyword_logits": "frames"}
    return _to_onnx(streaming, given, ("keyword_logits", "new_state"), axes)


def _to_onnx(network: nn.Module, given: dict[str, Tensor], outputs: Sequence[str], second: dict[str, str]) -> bytes:
    """`second` names the second axis of those tensors where it is dynamic; the first always is."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter warns that it is the older of two; the newer one needs another package and yields
        # the same operators. It also warns of each shape that it takes from an input, as it should.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            tuple(given.values()),
            stream,  # type: ignore[arg-type]  # the annotation forgets file objects, the documentation does not
            dynamo=False,
            opset_version=OPSET,
            input_names=list(given),
            output_names=list(outputs),
            dynamic_axes={
                name: {0: "batch", **({1: second[name]} if name in second else {})} for name in (*given, *outputs)
            },
        )
    return stream.getvalue()


def check_graph_equals_network(session: Session, student: nn.Module) -> None:
    """ONNX against torch, padded against alone, batch against single: all within TOLERANCE.

    Raises ExportError with the worst difference.
    """
    rng = np.random.default_rng(7)
    lengths = [SAMPLE_RATE_HZ // 7, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ * 2 + 77, SAMPLE_RATE_HZ * 5 + 1]
    levels = [0.3, 0.001, 0.05, 0.9]
    clips = [
        (rng.standard_normal(length) * level).clip(-1, 1).astype(np.float32)
        for length, level in zip(lengths, levels, strict=True)
    ]
    served = ServedGraph(student)
    together = run_graph(session, clips, served.names)
    with torch.no_grad():
        for row, clip in enumerate(clips):
            alone = run_graph(session, [clip], served.names)
            torch_out = served(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
            for name, network in zip(served.names, torch_out, strict=True):
                _within(f"{name}: ONNX against torch, clip {row}", alone[name][0], network[0].numpy())
                padded = together[name][row]
                if padded.ndim == 2:
                    padded = padded[: len(alone[name][0])]
                _within(f"{name}: padded against alone, clip {row}", padded, alone[name][0])


def check_stream_equals_clip(stream: StreamingGraph, clip: Session) -> None:
    """The streaming graph's logits against the clip graph's. Raises ExportError with the worst difference."""
    rng = np.random.default_rng(11)
    for seconds, frames in ((0.33, 1), (1.7, 2), (3.01, 7)):
        waveform = (rng.standard_normal(round(seconds * SAMPLE_RATE_HZ)) * 0.1).astype(np.float32)
        wanted = run_graph(clip, [waveform], ["keyword_logits"])["keyword_logits"][0]
        _within(f"streamed by {frames} frames", stream.whole(waveform, frames=frames), wanted)


def run_graph(session: Session, clips: list[Array], names: Sequence[str] = tuple(OUTPUTS)) -> dict[str, Array]:
    """These outputs for the clips as one padded batch."""
    lengths = np.array([len(clip) for clip in clips], dtype=np.int64)
    batch = np.zeros((len(clips), int(lengths.max())), dtype=np.float32)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = clip
    return dict(zip(names, session.run(list(names), {"waveform": batch, "lengths": lengths}), strict=True))


def speaker_cohort(session: Session, clips: list[Clip], most: int) -> Array:
    """One unit vector for each training speaker: the mean embedding of up to `most` of their clips."""
    by_speaker: dict[str, list[Clip]] = {}
    for clip in clips:
        by_speaker.setdefault(clip.speaker, []).append(clip)
    rows = []
    for _, own in sorted(by_speaker.items()):
        chosen = own[:: max(1, len(own) // most)][:most]
        embeddings = [run_graph(session, [decode(clip.path)], (SPEAKER,))[SPEAKER][0] for clip in chosen]
        mean = np.mean(embeddings, axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows).astype(np.float32)


def write_draft(out: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Replace the draft in `out`. Raises ExportError where what lies there is published: a version never changes."""
    if manifest.version:
        raise ExportError(f"{out} holds {manifest.name}@{manifest.version}, which is published; copy it to change it")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _manifest(
    name: str, finished: Finished, trained_on: list[Clip], files: Mapping[str, bytes], stream: StreamInfo | None
) -> Manifest:
    labels = finished.labels
    typical = _typical_durations(trained_on, labels)
    parameters = sum(parameter.numel() for parameter in finished.network.parameters())
    return Manifest(
        name=name,
        version=0,
        created_at=datetime.now(UTC),
        licence="CC-BY-SA-4.0",
        files={file: describe(content) for file, content in files.items()},
        graph=GraphInfo(file="model.onnx", opset=OPSET, parameters=parameters),
        stream=stream,
        audio=AudioLimits(shortest_s=SHORTEST_S, longest_s=LONGEST_S),
        keywords=KeywordInfo(
            labels=tuple(
                Keyword(label=label, threshold=PLACEHOLDER_THRESHOLD, typical_s=typical[label]) for label in labels
            ),
            frame_hop_s=finished.frame_hop_s,
            window_s=WINDOW_S,
            refractory_s=REFRACTORY_S,
            thresholds_from=f"{UNFITTED}; run `sotto calibrate`",
        ),
        speaker=_untold(finished.speaker_dim) if finished.speaker_dim else None,
        embedding=EmbeddingInfo(
            dim=finished.embedding_dim,
            frame_hop_s=finished.frame_hop_s,
            layers=finished.layers,
        ),
        golden_file="golden.npz",
        lineage=finished.lineage,
    )


def _untold(dim: int) -> SpeakerInfo:
    return SpeakerInfo(
        dim=dim,
        calibration=Calibration(scale=1.0, offset=0.0, fitted_on=f"{UNFITTED}; run `sotto calibrate`"),
        threshold=0.0,
        cohort_file=COHORT,
    )


def _typical_durations(clips: list[Clip], labels: list[str]) -> dict[str, float]:
    """Median length of each keyword over some of its training clips, in seconds."""
    found: dict[str, list[float]] = {label: [] for label in labels}
    for clip in clips:
        if clip.label not in found or len(found[clip.label]) >= COHORT_CLIPS:
            continue
        if clip.word_start_s is not None and clip.word_end_s is not None:
            found[clip.label].append(clip.word_end_s - clip.word_start_s)
        else:
            start_s, end_s = loudest_speech(decode(clip.path))
            found[clip.label].append(end_s - start_s)
    if labels != labels_of(clips):
        raise ExportError("the data's labels are not those of the run; was the manifest changed?")
    return {label: round(float(np.median(values)), 3) for label, values in found.items()}


def _golden_waveform() -> Array:
    """Two seconds of sweeping, swelling harmonics with pauses: made, so no recording is stored."""
    time = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    pitch = 120 + 60 * np.sin(2 * np.pi * 0.8 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE_HZ
    voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 20))
    envelope = np.maximum(0.0, np.sin(2 * np.pi * 2.5 * time)) * 0.1
    hiss = np.random.default_rng(1).standard_normal(len(time)) * 0.002
    return (voice * envelope + hiss).astype(np.float32)


def _within(what: str, found: Array, wanted: Array) -> None:
    worst = float(np.abs(found - wanted).max(initial=0.0)) if found.shape == wanted.shape else float("inf")
    if not worst < TOLERANCE:
        raise ExportError(f"{what}: worst difference {worst:.2e}, allowed are {TOLERANCE:.0e}")
