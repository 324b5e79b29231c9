"""A loaded bundle: one shared ONNX Runtime session and typed outputs. Immutable; safe from any thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store import Bundle, Manifest, verify_bundle
from model_store.graph import OUTPUTS
from model_store.inference import open_session
from model_store.verify import read_cohort
from service.audio import SAMPLE_RATE_HZ, Waveform

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Outputs:
    """One clip's share of a graph call; T frames of `frame_hop_s`, K labels with background first."""

    keyword_logits: Array  # [T, K]
    speaker_embedding: Array  # [D], unit length
    embedding: Array  # [E], unit length
    frames: Array  # [T, E]


class Engine:
    """Runs the clip graph of one bundle."""

    def __init__(self, bundle: Bundle, *, intra_op_threads: int) -> None:
        """Verifies the whole bundle first. Raises model_store.BundleError."""
        verify_bundle(bundle)
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.cohort = self._load_cohort()
        self._session = open_session(bundle.read(self.manifest.graph.file), threads=intra_op_threads)
        self._hop = round(self.manifest.keywords.frame_hop_s * SAMPLE_RATE_HZ)

    def run(self, waveforms: Sequence[Waveform]) -> list[Outputs]:
        """One graph call for all clips, padded to the longest; results do not depend on the neighbours."""
        lengths = np.array([len(waveform.samples) for waveform in waveforms], dtype=np.int64)
        if len(waveforms) == 1:
            batch = waveforms[0].samples[None, :]
        else:
            batch = np.zeros((len(waveforms), int(lengths.max())), dtype=np.float32)
            for row, waveform in enumerate(waveforms):
                batch[row, : len(waveform.samples)] = waveform.samples
        logits, speaker, embedding, frames = self._session.run(list(OUTPUTS), {"waveform": batch, "lengths": lengths})
        counts = -(-lengths // self._hop)
        return [
            Outputs(logits[row, :count], speaker[row], embedding[row], frames[row, :count])
            for row, count in enumerate(counts)
        ]

    def warm_up(self, largest_batch: int) -> None:
        """Run the shapes that traffic will bring, so that the first caller does not pay for them."""
        rng = np.random.default_rng(0)
        for seconds, count in ((1.0, 1), (1.0, largest_batch), (4.0, 2), (10.0, 1)):
            noise = rng.standard_normal(int(seconds * SAMPLE_RATE_HZ)).astype(np.float32) * np.float32(0.01)
            self.run([Waveform(noise)] * count)

    def _load_cohort(self) -> Array | None:
        name = self.manifest.speaker.cohort_file
        return None if name is None else read_cohort(self.bundle.read(name), self.manifest.speaker.dim)
