"""Audio without labels as lhotse cuts, bucketed by length: what pre-training and large distillations read.

Batch n is a pure function of (seed, n): epochs are laid out one after another, each by lhotse's sampler
with its own seed, so a run goes on after an interruption by naming the next number.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse import CutSet, MonoCut, Recording
from lhotse.audio import AudioSource
from lhotse.dataset.sampling import BucketingSampler
from lhotse.supervision import SupervisionSegment

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache
from training.errors import ManifestError
from training.manifest import Clip

SHORTEST_S = 0.1


@dataclass(frozen=True, slots=True)
class Waves:
    """B crops of N samples."""

    waveform: torch.Tensor  # [B, N] float32
    lengths: torch.Tensor  # [B] int64, samples
    names: tuple[str, ...] = ()  # of the recordings
    starts: tuple[int, ...] = ()  # first sample of each crop in its recording


def cuts_of(clips: Sequence[Clip], cache: AudioCache) -> CutSet:
    """One cut a clip, with who says what where that is known; lengths are those of the decoded audio."""
    return CutSet.from_cuts(_cut(clip, cache.length(clip.path)) for clip in clips)


def _cut(clip: Clip, samples: int) -> MonoCut:
    duration = samples / SAMPLE_RATE_HZ
    recording = Recording(
        id=clip.key,
        sources=[AudioSource("file", [0], str(clip.path))],
        sampling_rate=SAMPLE_RATE_HZ,
        num_samples=samples,
        duration=duration,
    )
    said = SupervisionSegment(
        id=clip.key,
        recording_id=clip.key,
        start=0.0,
        duration=duration,
        text=clip.transcript or clip.keyword,
        language=clip.language or None,
        speaker=clip.speaker or None,
        custom={"corpus": clip.corpus, "keyword": clip.keyword},
    )
    return MonoCut(id=clip.key, start=0.0, duration=duration, channel=0, recording=recording, supervisions=[said])


class CutBatches:
    """Batches of about `batch_s` seconds of audio of similar length; longer recordings come in windows."""

    def __init__(
        self,
        cuts: CutSet,
        cache: AudioCache,
        *,
        batch_s: float,
        longest_s: float,
        seed: int,
        buckets: int = 8,
    ) -> None:
        windows = CutSet.from_cuts(cut for cut in cuts.cut_into_windows(longest_s) if cut.duration >= SHORTEST_S)
        if len(windows) == 0:
            raise ManifestError(f"no recording is {SHORTEST_S} s long or longer")
        self.seconds = sum(cut.duration for cut in windows)
        self._cuts = windows
        self._cache = cache
        self._batch_s = batch_s
        self._buckets = min(buckets, len(windows))
        self._seed = seed
        self._ends: list[int] = []
        self._kept: tuple[int, list[list[str]]] | None = None

    def __getitem__(self, number: int) -> Waves:
        while not self._ends or number >= self._ends[-1]:
            batches = self._lay_out(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(batches))
        epoch = bisect.bisect_right(self._ends, number)
        first = self._ends[epoch - 1] if epoch else 0
        return self._read([self._cuts[name] for name in self._lay_out(epoch)[number - first]])

    def _lay_out(self, epoch: int) -> list[list[str]]:
        """The names of the cuts of each batch of an epoch."""
        if self._kept is None or self._kept[0] != epoch:
            # Which process takes which batch is the trainer's to say.
            sampler = BucketingSampler(
                self._cuts,
                max_duration=self._batch_s,
                num_buckets=self._buckets,
                shuffle=True,
                seed=self._seed + epoch,
                world_size=1,
                rank=0,
            )
            self._kept = (epoch, [[cut.id for cut in batch] for batch in sampler])
        return self._kept[1]

    def _read(self, cuts: Sequence[MonoCut]) -> Waves:
        starts = [round(cut.start * SAMPLE_RATE_HZ) for cut in cuts]
        counts = [round(cut.duration * SAMPLE_RATE_HZ) for cut in cuts]
        batch = torch.zeros(len(cuts), max(counts))
        lengths = []
        for row, (cut, start, count) in enumerate(zip(cuts, starts, counts, strict=True)):
            samples = self._cache.read(Path(cut.recording.sources[0].source), start, start + count)
            batch[row, : len(samples)] = torch.from_numpy(samples)
            lengths.append(len(samples))
        return Waves(batch, torch.tensor(lengths), tuple(cut.recording.id for cut in cuts), tuple(starts))
