"""Audio without labels as lhotse cuts, bucketed by length: what pre-training and large distillations read.

Batch n is a pure function of (seed, n): epochs are laid out one after another, each by lhotse's sampler
with its own seed, so a run goes on after an interruption by naming the next number. Where the recordings
are in lhotse's Shar format (`sotto corpus shar`), an epoch is a sequence of shards instead, each read once
from beginning to end.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording
from lhotse.audio import AudioSource
from lhotse.audio.mixer import AudioMixer
from lhotse.dataset.sampling import BucketingSampler
from lhotse.shar.readers.tar import iterate_tarfile_pairwise
from lhotse.supervision import SupervisionSegment
from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.audio_cache import SAMPLE_RATE_HZ, AudioCache, Waveform, decode
from training.augment import LONGEST_ROOM_SAMPLES, Augmenter, AugmentRecipe, reverberate
from training.bounds import Span
from training.errors import ManifestError
from training.manifest import Clip, digest_data
from training.manifest import Recording as Disturbance
from training.recipe import CorpusRecipe
from training.rooms import with_rooms

SHORTEST_S = 0.1
BUCKETS = 30


@dataclass(frozen=True, slots=True)
class Waves:
    """B crops of N samples."""

    waveform: torch.Tensor  # [B, N] float32
    lengths: torch.Tensor  # [B] int64, samples
    names: tuple[str, ...] = ()  # of the recordings
    starts: tuple[int, ...] = ()  # first sample of each crop in its recording
    clean: torch.Tensor | None = None  # [B, N] as recorded, where `waveform` is corrupted

    @property
    def as_recorded(self) -> Waves:
        """What a teacher hears, and what units are taken from."""
        return self if self.clean is None else replace(self, waveform=self.clean, clean=None)


class CorruptionRecipe(BaseModel):
    """Noise and rooms of the data's train split in what the model hears; its targets come from the recording
    itself (WavLM, Chen et al. 2022; RobustDistiller, Guimarães et al. 2023).

    Drawn for each recording: noise, a room, both and neither are equally likely as it stands.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    p_noise: float = Field(default=0.5, ge=0, le=1)
    p_room: float = Field(default=0.5, ge=0, le=1)
    snr_db: Span = (0.0, 20.0)
    p_white: float = Field(default=0.3, ge=0, le=1)  # of the noises
    # Over so many batches the lowest level falls from the highest one, and rooms become as likely as stated.
    curriculum_batches: int = Field(default=0, ge=0)


class AudioRecipe(CorpusRecipe):
    """What `sotto pretrain` and `sotto distil` say about the audio they hear."""

    batch_s: float = Field(default=60.0, gt=1)
    longest_s: float = Field(default=8.0, gt=0.5)
    corruption: CorruptionRecipe | None = None
    # Folders that `sotto corpus shar` wrote: heard instead of the train split of `data`, which then gives
    # only the fold, noises and rooms.
    shar: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _rooms_are_heard(self) -> AudioRecipe:
        if self.simulated_rooms and self.corruption is None:
            raise ValueError("simulated_rooms are heard through corruption, and there is none")
        return self

    def sources(self, cache_folder: Path) -> tuple[Batches, Batches | None, dict[str, Any]]:
        """Batches of the train split and of the fold (None where there is none), and what says exactly which
        audio that is. Raises ManifestError."""
        data, train, fold = self.read()
        disturbed = with_rooms(data, self.simulated_rooms, cache_folder, self.seed)
        noises, rooms = (
            [one for one in found if one.split == "train"] if self.corruption else []
            for found in (disturbed.noises, disturbed.rooms)
        )
        heard = fold if self.shar else [*train, *fold]
        cache = AudioCache.build(
            cache_folder, [*(clip.path for clip in heard), *(one.path for one in (*noises, *rooms))]
        )
        corrupt = None if self.corruption is None else Corruption(self.corruption, noises, rooms, cache, self.seed)
        layout = Layout(self.batch_s, self.longest_s, self.seed)
        source: Batches
        if self.shar:
            source = SharBatches(self.shar, layout, corrupt)
        else:
            source = CutBatches(cuts_of(train, cache), cache, layout, corrupt)
        watched = CutBatches(cuts_of(fold, cache), cache, layout) if fold else None
        return source, watched, {**digest_data(data), **digest_shar(self.shar)}


def cuts_of(clips: Sequence[Clip], cache: AudioCache) -> CutSet:
    """One cut a clip, with who says what where that is known; lengths are those of the decoded audio."""
    return CutSet.from_cuts(
        _cut(clip, AudioSource("file", [0], str(clip.path)), cache.length(clip.path)) for clip in clips
    )


def write_shar(clips: Iterable[Clip], out: Path, *, shard_size: int = 1000) -> int:
    """The clips as FLAC at 16 kHz in lhotse's Shar format, so many to a shard; returns how many.

    Raises ManifestError, also where `out` holds shards already.
    """
    if any(out.glob("cuts.*.jsonl.gz")):
        raise ManifestError(f"{out} holds shards already; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    count = 0

    def cuts() -> Iterator[MonoCut]:
        nonlocal count
        for clip in clips:
            samples = decode(clip.path)
            stream = io.BytesIO()
            soundfile.write(stream, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
            count += 1
            yield _cut(clip, AudioSource("memory", [0], stream.getvalue()), len(samples))

    CutSet(cuts()).to_shar(out, fields={"recording": "flac"}, shard_size=shard_size)
    return count


def digest_shar(folders: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each folder's lists of cuts and of its archives' sizes, by the folder's place and name."""
    digests = {}
    # Several disks may hold folders of one name.
    for place, folder in enumerate(folders):
        digest = hashlib.sha256()
        for cuts, recordings in _shards(folder):
            digest.update(cuts.read_bytes() + f":{recordings.stat().st_size}".encode())
        digests[f"shar/{place}/{folder.name}"] = digest.hexdigest()
    return digests


def _cut(clip: Clip, source: AudioSource, samples: int) -> MonoCut:
    duration = samples / SAMPLE_RATE_HZ
    recording = Recording(
        id=clip.key, sources=[source], sampling_rate=SAMPLE_RATE_HZ, num_samples=samples, duration=duration
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


class Corruption:
    """Draws by (seed, batch, row), so a batch is the same however often it is asked for."""

    def __init__(
        self,
        recipe: CorruptionRecipe,
        noises: Sequence[Disturbance],
        rooms: Sequence[Disturbance],
        cache: AudioCache,
        seed: int,
    ) -> None:
        if recipe.p_noise and recipe.p_white < 1 and not noises:
            raise ManifestError("there is no noise of the train split to mix with; it belongs into noise.csv")
        if recipe.p_room and not rooms:
            raise ManifestError("there is no room response of the train split; it belongs into rir.csv")
        self._recipe, self._rooms, self._cache, self._seed = recipe, list(rooms), cache, seed
        self._disturbances = Augmenter(AugmentRecipe(p_white=recipe.p_white), cache, noises, rooms)

    def __call__(self, samples: Waveform, number: int, row: int) -> Waveform:
        """The room first, then noise at its level below what the room made of the speech: as it happens."""
        recipe = self._recipe
        rng = np.random.default_rng((self._seed, number, row))
        with_noise, with_room = rng.random() < recipe.p_noise, rng.random() < recipe.p_room * self._progress(number)
        lowest, highest = recipe.snr_db
        snr_db = float(rng.uniform(highest - (highest - lowest) * self._progress(number), highest))
        if not samples.any():
            return samples
        if with_room:
            room = self._rooms[int(rng.integers(len(self._rooms)))]
            samples = reverberate(samples, self._cache.read(room.path, 0, LONGEST_ROOM_SAMPLES))
        if with_noise:
            mixer = AudioMixer(samples[None, :], SAMPLE_RATE_HZ)
            mixer.add_to_mix(self._disturbances.noise(len(samples), rng)[None, :], snr=snr_db)
            samples = np.asarray(mixer.mixed_audio[0], dtype=np.float32)
        return samples

    def _progress(self, number: int) -> float:
        return min(1.0, number / self._recipe.curriculum_batches) if self._recipe.curriculum_batches else 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How recordings become batches."""

    batch_s: float
    longest_s: float  # of a window
    seed: int


class Batches(ABC):
    """Batches of about `batch_s` seconds of audio of similar length; longer recordings come in windows.

    Parts follow one another without end; a part is an epoch, or a shard of one.
    """

    def __init__(self, layout: Layout, corrupt: Corruption | None) -> None:
        self._layout, self._corrupt = layout, corrupt
        self._ends: list[int] = []
        self._kept: tuple[int, CutSet, list[list[str]]] | None = None

    @abstractmethod
    def _cuts_of_part(self, part: int, /) -> CutSet:
        """Whole recordings."""

    @abstractmethod
    def _samples(self, part: int, cut: MonoCut, /) -> Waveform:
        """Of one of the part's cuts."""

    @property
    @abstractmethod
    def parts_an_epoch(self) -> int:
        """How many parts hold everything once."""

    def __getitem__(self, number: int) -> Waves:
        while not self._ends or number >= self._ends[-1]:
            if len(self._ends) >= self.parts_an_epoch and self._ends[-1] == 0:
                raise ManifestError(f"no recording is {SHORTEST_S} s long or longer")
            laid_out = self._lay_out(len(self._ends))[1]
            self._ends.append((self._ends[-1] if self._ends else 0) + len(laid_out))
        part = bisect.bisect_right(self._ends, number)
        first = self._ends[part - 1] if part else 0
        cuts, laid_out = self._lay_out(part)
        return self._read(part, [cuts[name] for name in laid_out[number - first]], number)

    def epoch(self) -> Iterator[Waves]:
        """The first one."""
        number = 0
        while len(self._ends) < self.parts_an_epoch or number < self._ends[self.parts_an_epoch - 1]:
            yield self[number]
            number += 1

    def _lay_out(self, part: int) -> tuple[CutSet, list[list[str]]]:
        """A part's windows, and the names of those in each batch."""
        if self._kept is None or self._kept[0] != part:
            cuts = self._cuts_of_part(part).cut_into_windows(self._layout.longest_s)
            windows = CutSet.from_cuts(cut for cut in cuts if cut.duration >= SHORTEST_S)
            # Which process takes which batch is the trainer's to say.
            sampler = BucketingSampler(
                windows,
                max_duration=self._layout.batch_s,
                num_buckets=max(1, min(BUCKETS, len(windows))),
                shuffle=True,
                seed=self._layout.seed + part,
                world_size=1,
                rank=0,
            )
            self._kept = (part, windows, [[cut.id for cut in batch] for batch in sampler])
        return self._kept[1], self._kept[2]

    def _read(self, part: int, cuts: Sequence[MonoCut], number: int) -> Waves:
        found = [torch.from_numpy(self._samples(part, cut)) for cut in cuts]
        waveform = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        lengths = torch.tensor([len(samples) for samples in found])
        names = tuple(cut.recording.id for cut in cuts)
        starts = tuple(_span(cut)[0] for cut in cuts)
        if self._corrupt is None:
            return Waves(waveform, lengths, names, starts)
        corrupted = [torch.from_numpy(self._corrupt(samples.numpy(), number, row)) for row, samples in enumerate(found)]
        return Waves(torch.nn.utils.rnn.pad_sequence(corrupted, batch_first=True), lengths, names, starts, waveform)


class CutBatches(Batches):
    """Of recordings in the audio cache; a part is an epoch."""

    parts_an_epoch = 1

    def __init__(self, cuts: CutSet, cache: AudioCache, layout: Layout, corrupt: Corruption | None = None) -> None:
        super().__init__(layout, corrupt)
        self._cuts, self._cache = cuts, cache

    def _cuts_of_part(self, _part: int, /) -> CutSet:
        return self._cuts

    def _samples(self, _part: int, cut: MonoCut, /) -> Waveform:
        return self._cache.read(Path(cut.recording.sources[0].source), *_span(cut))


class SharBatches(Batches):
    """Of shards, which may lie on several disks; a part is a shard, and their order is new in every epoch.

    One shard's audio is in memory at a time. A batch's recordings come from one shard, so shards should hold
    hundreds of recordings that were in no particular order.
    """

    def __init__(self, folders: Sequence[Path], layout: Layout, corrupt: Corruption | None = None) -> None:
        super().__init__(layout, corrupt)
        self._shards = [shard for folder in folders for shard in _shards(folder)]
        self._open: tuple[int, dict[str, npt.NDArray[np.int16]]] | None = None

    @property
    def parts_an_epoch(self) -> int:
        return len(self._shards)

    def _shard(self, part: int) -> int:
        epoch, place = divmod(part, len(self._shards))
        return int(np.random.default_rng((self._layout.seed, epoch)).permutation(len(self._shards))[place])

    def _cuts_of_part(self, part: int, /) -> CutSet:
        return CutSet.from_file(self._shards[self._shard(part)][0]).to_eager()

    def _samples(self, part: int, cut: MonoCut, /) -> Waveform:
        shard = self._shard(part)
        if self._open is None or self._open[0] != shard:
            self._open = shard, _open_archive(self._shards[shard][1])
        start, stop = _span(cut)
        return self._open[1][cut.recording.id][start:stop].astype(np.float32) / np.float32(32768)


def _shards(folder: Path) -> list[tuple[Path, Path]]:
    """(list of cuts, archive of recordings) of each shard. Raises ManifestError."""
    found = []
    for cuts in sorted(folder.glob("cuts.*.jsonl.gz")):
        recordings = folder / cuts.name.replace("cuts.", "recording.", 1).replace(".jsonl.gz", ".tar")
        if not recordings.is_file():
            raise ManifestError(f"{recordings} is not there, though {cuts.name} is")
        found.append((cuts, recordings))
    if not found:
        raise ManifestError(f"{folder} holds no shards (cuts.000000.jsonl.gz and recording.000000.tar)")
    return found


def _span(cut: MonoCut) -> tuple[int, int]:
    """First sample in the recording, and the one after the last."""
    start = round(cut.start * SAMPLE_RATE_HZ)
    return start, start + round(cut.duration * SAMPLE_RATE_HZ)


def _open_archive(path: Path) -> dict[str, npt.NDArray[np.int16]]:
    """All recordings of a shard by name. Raises ManifestError."""
    found = {}
    try:
        # Not through CutSet.from_shar, which leaves the archive open.
        with tarfile.open(path) as archive:
            for (data, _), (meta, _) in iterate_tarfile_pairwise(archive):
                samples, _ = soundfile.read(io.BytesIO(data), dtype="int16")
                found[json.loads(meta)["id"]] = samples
    except (OSError, RuntimeError, ValueError, KeyError, tarfile.TarError) as error:
        raise ManifestError(f"{path} is damaged: {error}") from error
    return found
