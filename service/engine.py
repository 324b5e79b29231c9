"""A loaded bundle: ONNX Runtime sessions and typed outputs. Immutable; safe from any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from model_store import Bundle, Manifest, SpeakerInfo, verify_bundle
from model_store.graph import OUTPUTS, outputs_of, part_of
from model_store.inference import Provider, computes_in_eight_bits, open_session
from model_store.streaming import Chunk, StreamingGraph
from model_store.verify import read_cohort
from model_store.whole import Clips, open_clips
from service.audio import SAMPLE_RATE_HZ, Waveform
from service.errors import InvalidRequestError, TaskUnsupportedError
from service.keywords import thresholds_of

Array = npt.NDArray[np.float32]

# What a caller needs of the graph. Keywords alone cost about three quarters of everything.
Part = Literal["keywords", "speaker", "all"]
PARTS: dict[Part, tuple[str, ...]] = {
    "keywords": ("keyword_logits",),
    "speaker": ("speaker_embedding",),
    "all": tuple(OUTPUTS),
}
# What a caller may ask of a model, by the names that the routes use.
Task = Literal["keywords", "speaker", "embedding"]
TASKS: tuple[Task, ...] = ("keywords", "speaker", "embedding")
# Resident bytes of a session for each byte of its graph: the weights as given and as packed for the kernels.
MEMORY_FACTOR = 3
# Bytes of float weights for each byte of the file.
FLOAT_BYTES = {"float32": 1, "int8": 4}
# (seconds, clips) run before the first caller comes, the largest batch in place of None.
WARM_UP = ((1.0, 1), (1.0, None), (4.0, 2), (10.0, 1))
# The same for streams, alone and in the largest batch: what a microphone brings at a time, and what a file sent faster
# than it plays does.
WARM_UP_FRAMES = (5, 40)


@dataclass(frozen=True, slots=True)
class Outputs:
    """One clip's share of a graph call; T frames of `frame_hop_s`, K labels with background first. What the
    call's part, or the model, does not hold raises KeyError."""

    arrays: Mapping[str, Array]

    @property
    def keyword_logits(self) -> Array:
        """[T, K]."""
        return self.arrays["keyword_logits"]

    @property
    def speaker_embedding(self) -> Array:
        """[D], unit length."""
        return self.arrays["speaker_embedding"]

    @property
    def embedding(self) -> Array:
        """[E], unit length."""
        return self.arrays["embedding"]

    @property
    def frames(self) -> Array:
        """[T, E]."""
        return self.arrays["frames"]


class Engine:
    """Runs the clip graph of one bundle, or the part of it that is asked for."""

    def __init__(self, bundle: Bundle, *, intra_op_threads: int, provider: Provider = "cpu") -> None:
        """Verifies the whole bundle first. Raises model_store.BundleError."""
        verified = verify_bundle(bundle)
        # Building a session again takes as long as some hundred calls.
        as_verified = intra_op_threads == 1 and provider == "cpu"
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.cohort = self._load_cohort()
        self.every_keyword = np.ones(len(self.manifest.keywords.labels), dtype=np.bool_)
        self.every_keyword.flags.writeable = False
        self.thresholds = thresholds_of(self.manifest.keywords)
        self.memory_bytes = 0
        graph = bundle.read(self.manifest.graph.file)
        given = outputs_of(self.manifest)
        self._names = {part: kept for part, names in PARTS.items() if (kept := [one for one in names if one in given])}
        self._sessions: dict[Part, Clips] = {}
        for part, names in self._names.items():
            own = graph if part == "all" else part_of(graph, names)
            self._sessions[part] = (
                verified.clips
                if part == "all" and as_verified
                else open_clips(own, threads=intra_op_threads, provider=provider)
            )
            self.memory_bytes += self._sessions[part].copies * self._resident_bytes(own)
        self._hop = round(self.manifest.keywords.frame_hop_s * SAMPLE_RATE_HZ)
        self.streaming: StreamingGraph | None = None
        stream = self.manifest.stream
        if stream is not None:
            own = bundle.read(stream.file)
            session = verified.stream if as_verified else None
            if session is None:
                session = open_session(own, threads=intra_op_threads, provider=provider)
            self.streaming = StreamingGraph(session, stream, hop=self._hop)
            self.memory_bytes += self._resident_bytes(own)

    def require(self, *tasks: Task) -> None:
        """Raises TaskUnsupportedError where the model cannot do one of them."""
        own = tasks_of(self.manifest)
        missing = sorted(set(tasks) - set(own))
        if missing:
            name = f"{self.manifest.name}@{self.manifest.version}"
            raise TaskUnsupportedError(f"{name} has no task {', '.join(missing)}; it has {', '.join(own)}")

    @property
    def speaker(self) -> SpeakerInfo:
        """How speakers are told apart. Raises TaskUnsupportedError."""
        self.require("speaker")
        assert self.manifest.speaker is not None
        return self.manifest.speaker

    def accepts_from(self, false_accept_rate: float | None) -> float:
        """The log-likelihood ratio from which a claim is accepted. Raises TaskUnsupportedError, and InvalidRequestError
        where the model has no operating point for that rate."""
        if false_accept_rate is None:
            return self.speaker.threshold
        points = {point.false_accept_rate: point.threshold for point in self.speaker.operating_points}
        if false_accept_rate not in points:
            own = ", ".join(f"{rate:g}" for rate in sorted(points, reverse=True)) or "none"
            raise InvalidRequestError(
                f"no threshold is known for false_accept_rate={false_accept_rate:g}; known are {own}"
            )
        return points[false_accept_rate]

    @property
    def space(self) -> tuple[str, int]:
        """The model, by name and version, under which speakers are enrolled; several versions may share it."""
        name, _, version = self.manifest.speaker_space.partition("@")
        return name, int(version)

    def run(self, waveforms: Sequence[Waveform], part: Part = "all") -> list[Outputs]:
        """One graph call for all clips, padded to the longest; results do not depend on the neighbours."""
        lengths = np.array([len(waveform.samples) for waveform in waveforms], dtype=np.int64)
        if len(waveforms) == 1:
            batch = waveforms[0].samples[None, :]
        else:
            batch = np.zeros((len(waveforms), int(lengths.max())), dtype=np.float32)
            for row, waveform in enumerate(waveforms):
                batch[row, : len(waveform.samples)] = waveform.samples
        names = self._names[part]
        found = self._sessions[part].run(names, {"waveform": batch, "lengths": lengths})
        counts = -(-lengths // self._hop)
        return [
            Outputs(
                {
                    # Those with a time axis end where the clip does.
                    name: values[row, :count] if values.ndim == 3 else values[row]
                    for name, values in zip(names, found, strict=True)
                }
            )
            for row, count in enumerate(counts)
        ]

    def warm_up(self, largest_batch: int) -> None:
        """Run the shapes that traffic will bring, so that the first caller does not pay for them."""
        rng = np.random.default_rng(0)
        for part in self._names:
            for seconds, count in WARM_UP:
                noise = rng.standard_normal(int(seconds * SAMPLE_RATE_HZ)).astype(np.float32) * np.float32(0.01)
                clips = [Waveform(noise)] * (count or largest_batch)
                self.run(clips, part)
                if len(clips) > 1:
                    # With masks.
                    self.run([Waveform(noise[:-1]), *clips[1:]], part)
        if self.streaming is not None:
            for frames in WARM_UP_FRAMES:
                quiet = np.zeros(frames * self.streaming.hop, dtype=np.float32)
                for count in (1, largest_batch):
                    self.streaming.run([Chunk(self.streaming.begin(), quiet)] * count)

    def _resident_bytes(self, graph: bytes) -> int:
        weights = 1 if computes_in_eight_bits(graph) else FLOAT_BYTES[self.manifest.graph.weights]
        return MEMORY_FACTOR * weights * len(graph)

    def _load_cohort(self) -> Array | None:
        speaker = self.manifest.speaker
        if speaker is None or speaker.cohort_file is None:
            return None
        return read_cohort(self.bundle.read(speaker.cohort_file), speaker.dim)


def tasks_of(manifest: Manifest) -> tuple[Task, ...]:
    """What a model can be asked for."""
    return tuple(task for task in TASKS if task != "speaker" or manifest.speaker is not None)
