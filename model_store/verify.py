"""Everything that must hold before a bundle is served."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model_store import golden
from model_store.errors import BundleError
from model_store.graph import OUTPUTS, SPEAKER, check_graph, check_stream_graph, outputs_of
from model_store.inference import Session, computes_in_eight_bits, open_session
from model_store.store import MANIFEST, Bundle
from model_store.streaming import Chunk, StreamingGraph
from model_store.whole import Clips, open_clips

# Neighbours for the batch check: a louder one and one so quiet that any shared scale would show.
NEIGHBOUR_GAINS = (1.0, 8.0, 0.001)
# Frames at a time in which the streaming graph is given the golden clip.
STREAM_CHUNKS = (1, 5, 40)
# How far a unit vector's length may be from 1: far above float32 rounding, far below what moves a score.
UNIT_TOLERANCE = 1e-3
# Least cosine between what two versions make of one clip for their profiles to be shared. Eight bits come to 0.99.
SAME_SPACE = 0.95

Opened = TypeVar("Opened", Clips, Session)


@dataclass(frozen=True, slots=True)
class Verified:
    """The sessions, of one thread on the CPU, in which the graphs were found sound."""

    clips: Clips
    stream: Session | None


def verify_bundle(bundle: Bundle) -> Verified:
    """Check files, graph and outputs. Raises BundleError with the first fault found.

    Nothing reaches ONNX Runtime before every file's hash, the absence of external data, the operator
    set and the input and output names are known to be right.
    """
    _check_listing(bundle)
    contents = {name: bundle.read(name) for name in bundle.manifest.files}
    graph = contents[bundle.manifest.graph.file]
    check_graph(graph, bundle.manifest)
    stream = bundle.manifest.stream
    if stream is not None:
        check_stream_graph(contents[stream.file], stream.file, bundle.manifest.graph.opset)
    waveform, expected = golden.unpack(contents[bundle.manifest.golden_file], outputs_of(bundle.manifest))
    _check_cohort(bundle, contents)
    session = _opened(open_clips, graph)
    exactly = bundle.manifest.graph.arithmetic == "float32"
    if exactly == computes_in_eight_bits(graph):
        raise BundleError(f"the manifest says that the graph computes in {bundle.manifest.graph.arithmetic}")
    found = _check_golden(session, waveform, expected, exactly=exactly)
    _check_dimensions(bundle, expected)
    _check_invariance(session, waveform, found)
    if stream is None:
        return Verified(session, None)
    hop = round(bundle.manifest.keywords.frame_hop_s * bundle.manifest.audio.sample_rate_hz)
    own = _opened(open_session, contents[stream.file])
    _check_stream(StreamingGraph(own, stream, hop=hop), waveform, expected["keyword_logits"], exactly=exactly)
    return Verified(session, own)


def check_space(draft: Bundle, other: Bundle) -> None:
    """That `other` gives the draft's golden clip the speaker embedding that the draft gives it, nearly: those of
    networks that were trained apart have nothing to do with each other. Raises BundleError."""
    waveform, expected = golden.unpack(draft.read(draft.manifest.golden_file), outputs_of(draft.manifest))
    if SPEAKER not in expected or SPEAKER not in outputs_of(other.manifest):
        raise BundleError("only models that tell speakers apart share profiles")
    graph = other.read(other.manifest.graph.file)
    check_graph(graph, other.manifest)
    found = _run(_opened(open_session, graph), [waveform], [SPEAKER])[SPEAKER][0]
    if found.shape != expected[SPEAKER].shape:
        raise BundleError(f"speaker embeddings have {len(expected[SPEAKER])} and {len(found)} values")
    cosine = float(found @ expected[SPEAKER])
    if not cosine >= SAME_SPACE:
        name = f"{other.manifest.name}@{other.manifest.version}"
        raise BundleError(f"its speaker embeddings are not those of {name}: cosine {cosine:.3f}, needed {SAME_SPACE}")


def _check_listing(bundle: Bundle) -> None:
    found = {entry.name for entry in os.scandir(bundle.path)}
    strangers = sorted(found - set(bundle.manifest.files) - {MANIFEST})
    if strangers:
        raise BundleError(f"{bundle.path} holds files that the manifest does not list: {', '.join(strangers)}")


def _check_cohort(bundle: Bundle, contents: dict[str, bytes]) -> None:
    speaker = bundle.manifest.speaker
    if speaker is not None and speaker.cohort_file is not None:
        read_cohort(contents[speaker.cohort_file], speaker.dim)


def read_cohort(data: bytes, dim: int) -> golden.Array:
    """The cohort, [speakers, dim] unit vectors as float32, from raw little-endian float32 bytes."""
    if len(data) % (4 * dim) or not data:
        raise BundleError(f"the cohort has {len(data)} bytes, no multiple of {dim} float32")
    cohort = np.frombuffer(data, dtype="<f4").reshape(-1, dim).astype(np.float32)
    if not np.allclose(np.linalg.norm(cohort, axis=1), 1.0, rtol=0, atol=UNIT_TOLERANCE):
        raise BundleError("the cohort's rows are not unit vectors")
    return cohort


def _check_stream(graph: StreamingGraph, waveform: golden.Array, logits: golden.Array, *, exactly: bool) -> None:
    """The golden clip chunk by chunk, alone and beside a stream that is elsewhere, gives what it gives as a whole."""
    try:
        if not exactly:
            # Clips are rounded, streams are not.
            whole = graph.whole(waveform, frames=max(STREAM_CHUNKS))
            golden.resemble("golden clip as a stream", logits, whole)
            logits = whole
        for frames in STREAM_CHUNKS:
            golden.compare(f"golden clip by {frames} frames", logits, graph.whole(waveform, frames=frames))
        golden.compare("golden clip as one of two streams", logits, _beside_another(graph, waveform))
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(f"the streaming graph does not run: {error}") from error


def _beside_another(graph: StreamingGraph, waveform: golden.Array) -> golden.Array:
    """The clip's logits, frame by frame, in calls with a louder stream that is two frames further on."""
    size, loud = graph.hop, np.clip(waveform * np.float32(NEIGHBOUR_GAINS[1]), -1, 1)
    frames = -(-len(waveform) // size) + graph.info.delay_frames
    own, other = graph.begin(), graph.begin()
    ((_, other),) = graph.run([Chunk(other, np.resize(loud, 2 * size).astype(np.float32))])
    padded = np.zeros(frames * size, dtype=np.float32)
    padded[: len(waveform)] = waveform
    parts = []
    for begin in range(0, len(padded), size):
        chunk = Chunk(own, padded[begin : begin + size], len(waveform))
        neighbour = Chunk(other, np.resize(loud, size).astype(np.float32))
        (found, own), (_, other) = graph.run([chunk, neighbour])
        parts.append(found)
    return np.concatenate(parts)


def _opened(opener: Callable[..., Opened], graph: bytes) -> Opened:
    try:
        return opener(graph, threads=1)
    except Exception as error:
        # ONNX Runtime's exceptions share no base class of their own.
        raise BundleError(f"ONNX Runtime refuses the graph: {error}") from error


def _run(session: Session, waveforms: list[golden.Array], names: Iterable[str]) -> dict[str, golden.Array]:
    lengths = np.array([len(waveform) for waveform in waveforms], dtype=np.int64)
    batch = np.zeros((len(waveforms), int(lengths.max())), dtype=np.float32)
    for row, waveform in enumerate(waveforms):
        batch[row, : len(waveform)] = waveform
    wanted = list(names)
    try:
        values = session.run(wanted, {"waveform": batch, "lengths": lengths})
    except Exception as error:
        raise BundleError(f"the graph does not run: {error}") from error
    outputs = dict(zip(wanted, values, strict=True))
    for name in wanted:
        _, rank = OUTPUTS[name]
        # ONNX Runtime only warns where a shape is not the declared one.
        if outputs[name].ndim != rank or len(outputs[name]) != len(waveforms):
            raise BundleError(f"{name} has shape {outputs[name].shape}, not what the contract says")
    return outputs


def _check_golden(
    session: Session, waveform: golden.Array, expected: dict[str, golden.Array], *, exactly: bool
) -> dict[str, golden.Array]:
    """What the graph gives here, where that is as expected."""
    check = golden.compare if exactly else golden.resemble
    found = {name: values[0] for name, values in _run(session, [waveform], expected).items()}
    for name in expected:
        check(f"golden clip: {name}", expected[name], found[name])
    return found


def _check_dimensions(bundle: Bundle, expected: dict[str, golden.Array]) -> None:
    manifest = bundle.manifest
    wanted = {
        "keyword_logits": 1 + len(manifest.keywords.labels),
        "embedding": manifest.embedding.dim,
        "frames": manifest.embedding.dim,
    }
    if manifest.speaker is not None:
        wanted[SPEAKER] = manifest.speaker.dim
    for name, size in wanted.items():
        if expected[name].shape[-1] != size:
            raise BundleError(f"{name} has {expected[name].shape[-1]} values, the manifest says {size}")
    length = float(np.linalg.norm(expected[SPEAKER])) if SPEAKER in expected else 1.0
    if not abs(length - 1.0) <= UNIT_TOLERANCE:
        raise BundleError(f"speaker_embedding has length {length:.4g}, it must be a unit vector")


def _check_invariance(session: Session, waveform: golden.Array, alone: dict[str, golden.Array]) -> None:
    """The clip among longer, louder and near-silent neighbours gives what it gives alone."""
    longer = np.concatenate([waveform, waveform[::-1], waveform])
    neighbours = [np.clip(longer * np.float32(gain), -1, 1).astype(np.float32) for gain in NEIGHBOUR_GAINS]
    found = _run(session, [waveform, *neighbours], alone)
    for name in alone:
        own = found[name][0]
        if own.ndim == 2:
            own = own[: len(alone[name])]
        golden.compare(f"batched golden clip: {name}", alone[name], own)
