"""Training batches: step n is a pure function of (seed, n), whatever ran before.

Every item is a crop of `crop_s` seconds that holds its keyword whole, corrupted, with targets for both
tasks. That purity makes an interrupted run continue exactly as if it had not been.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from training.alignment import loudest_speech
from training.audio_cache import SAMPLE_RATE_HZ, AudioCache, Waveform
from training.augment import Augmenter, AugmentRecipe, change_speed
from training.bounds import NotNegative, Positive, Probability
from training.manifest import Clip, Data
from training.students.edge import FRAME_HOP
from training.voices import Voices

NO_SPEAKER = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tensors. B items, N samples, K labels (background first)."""

    waveform: torch.Tensor  # [B, N] float32
    lengths: torch.Tensor  # [B] int64, samples
    keyword: torch.Tensor  # [B] int64, 0 = background
    word_s: torch.Tensor  # [B, 2] float32, start and end of the keyword in the crop; zeros for none
    possible: torch.Tensor  # [B, K] bool, False where the label may be spoken without being marked
    speaker: torch.Tensor  # [B] int64, NO_SPEAKER where unknown
    hint: torch.Tensor | None = None  # [B, T, D] float32, a teacher's vectors at the student's frames
    hinted: torch.Tensor | None = None  # [B, T] bool, False where the teacher said nothing
    voice: torch.Tensor | None = None  # [B, D] float32, speaker teachers' vectors; zeros for none
    clean: torch.Tensor | None = None  # [B, N] float32, the crops before they were corrupted
    unlabelled: torch.Tensor | None = None  # [B, M] float32, other audio for a teacher and its student
    unlabelled_lengths: torch.Tensor | None = None  # [B] int64


@dataclass(frozen=True, slots=True)
class _Crop:
    """A stretch of a clip on its way into a batch."""

    samples: Waveform
    clean: Waveform  # `samples` before corruption
    length: int  # of what is valid, in samples
    word_s: tuple[float, float]
    whole: bool  # whether the clip's word is in it
    begin: int  # the clip's sample at which it starts
    offset: int  # where in the crop that sample lies
    speed: float


class Hints(Protocol):
    """What a teacher says about a clip at given times."""

    width: int

    def at(self, path: Path, samples: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Vectors [T, D] at the clip's sample positions [T], and where they are known."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingRecipe:
    """How often each corpus is drawn, relative to its number of clips, and how crops are cut."""

    crop_s: Positive = 1.6
    corpus_weight: dict[str, NotNegative] | None = None
    p_noise_only: Probability = 0.05
    # Short clips that end where their audio ends, as when served; the others float in silence, as in long audio.
    p_alone: Probability = 0.5
    # At most this much is cut from each end of a clip that fits into a crop, never from its word: recordings of
    # one corpus begin and end alike, and what is learnt from that holds nowhere else.
    trim_s: NotNegative = 0.0
    # Corpora of untranscribed speech may hold everyday words unmarked ("two coffees"). They count as
    # proof of absence only for the labels of these corpora.
    certain_negatives: tuple[str, ...] = ()


class BatchSource(Dataset[Batch]):
    """Maps a step number, of `steps` in all, to its batch."""

    def __init__(
        self,
        data: Data,
        clips: Sequence[Clip],
        cache: AudioCache,
        labels: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        sampling: SamplingRecipe,
        augment: AugmentRecipe,
        steps: int = 0,
        hints: Hints | None = None,
        voices: Voices | None = None,
        keep_clean: bool = False,
    ) -> None:
        self._keep_clean = keep_clean
        self._hints = hints
        self._voices = voices
        self._clips = list(clips)
        self._cache = cache
        self._batch_size = batch_size
        self._seed = seed
        self._sampling = sampling
        self._speeds = augment.speeds
        self._steps = steps
        self._augmenter = Augmenter(
            augment,
            cache,
            [noise for noise in data.noises if noise.split == "train"],
            [room for room in data.rooms if room.split == "train"],
        )
        self._class_of = {label: index for index, label in enumerate(labels, start=1)}
        self.speakers = sorted({clip.speaker for clip in self._clips if clip.speaker})
        self._speaker_index = {name: index for index, name in enumerate(self.speakers)}
        weights = np.array([self._weight(clip) for clip in self._clips])
        self._cumulative = np.cumsum(weights / weights.sum())
        self._possible = _possible_labels(self._clips, labels, sampling.certain_negatives)
        self._words = [self._word(clip) for clip in self._clips]

    @property
    def speaker_classes(self) -> int:
        return len(self.speakers) * len(self._speeds)

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((self._seed, step))
        progress = step / self._steps if self._steps else 0.0
        items = [self._item(rng, progress) for _ in range(self._batch_size)]
        hints = [self._hint(item[0], item[3]) for item in items] if self._hints is not None else []
        return Batch(
            waveform=torch.from_numpy(np.stack([item[0].samples for item in items])),
            lengths=torch.tensor([item[0].length for item in items]),
            keyword=torch.tensor([item[1] for item in items]),
            word_s=torch.tensor([item[0].word_s for item in items], dtype=torch.float32),
            possible=torch.from_numpy(np.stack([item[2] for item in items])),
            speaker=torch.tensor([item[4] for item in items]),
            hint=torch.from_numpy(np.stack([hint for hint, _ in hints])) if hints else None,
            hinted=torch.from_numpy(np.stack([known for _, known in hints])) if hints else None,
            voice=torch.from_numpy(np.stack([self._voice(item[0], item[3]) for item in items]))
            if self._voices is not None
            else None,
            clean=torch.from_numpy(np.stack([item[0].clean for item in items])) if self._keep_clean else None,
        )

    def _weight(self, clip: Clip) -> float:
        per_clip = (self._sampling.corpus_weight or {}).get(clip.corpus, 1.0)
        # A long clip holds several crops' worth of speech.
        return per_clip * max(1.0, clip.duration_s / (2 * self._sampling.crop_s))

    def _word(self, clip: Clip) -> tuple[float, float]:
        if clip.word_start_s is not None and clip.word_end_s is not None:
            return clip.word_start_s, clip.word_end_s
        return loudest_speech(self._cache.read(clip.path)) if clip.keyword else (0.0, 0.0)

    def _item(
        self, rng: np.random.Generator, progress: float
    ) -> tuple[_Crop, int, npt.NDArray[np.bool_], Clip | None, int]:
        """(corrupted crop, keyword class, possible labels, the clip, speaker class)."""
        size = round(self._sampling.crop_s * SAMPLE_RATE_HZ)
        if rng.random() < self._sampling.p_noise_only:
            noise = self._augmenter.corrupt(self._augmenter.noise(size, rng), rng, progress=progress)
            everything = np.ones(len(self._class_of) + 1, dtype=np.bool_)
            return _Crop(noise, noise, size, (0.0, 0.0), False, 0, 0, 1.0), 0, everything, None, NO_SPEAKER
        index = int(np.searchsorted(self._cumulative, rng.random()))
        clip = self._clips[index]
        speed_index = self._augmenter.speed(rng)
        crop = self._crop(index, self._speeds[speed_index], size, rng)
        speaker = NO_SPEAKER
        if clip.speaker:
            speaker = self._speaker_index[clip.speaker] * len(self._speeds) + speed_index
        heard = self._augmenter.corrupt(crop.samples, rng, progress=progress)
        heard[crop.length :] = 0.0
        keyword = self._class_of[clip.label] if clip.keyword and crop.whole else 0
        return replace(crop, samples=heard), keyword, self._possible[index], clip, speaker

    def _hint(self, crop: _Crop, clip: Clip | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The teacher's vectors at the crop's frames; it heard the clip as it was recorded."""
        assert self._hints is not None
        centres = np.arange(0, len(crop.samples), FRAME_HOP, dtype=np.float64)
        if clip is None:
            return np.zeros((len(centres), self._hints.width), dtype=np.float32), np.zeros(len(centres), dtype=np.bool_)
        vectors, known = self._hints.at(clip.path, crop.begin + (centres - crop.offset) * crop.speed)
        return vectors, known & (centres < crop.length)

    def _voice(self, crop: _Crop, clip: Clip | None) -> npt.NDArray[np.float32]:
        """At another speed the voice is another person's, whom the teacher may not have heard."""
        assert self._voices is not None
        return self._voices.none() if clip is None else self._voices.of(clip.path, crop.speed)

    def _crop(self, index: int, speed: float, size: int, rng: np.random.Generator) -> _Crop:
        """At the given speed."""
        clip = self._clips[index]
        start_s, end_s = self._words[index]
        total = self._cache.length(clip.path)
        reach = min(total, int(size * speed))
        word = (int(start_s * SAMPLE_RATE_HZ), int(end_s * SAMPLE_RATE_HZ))
        keep_word = bool(clip.keyword)
        long_clip = total > 2 * reach
        if keep_word and long_clip and rng.random() < 0.4:
            # The rest of a sentence is the best background there is: same voice, same channel.
            begin = _away_from(word, total, reach, rng)
            keep_word = begin is None
            if begin is not None:
                return self._read(clip, begin, reach, speed, size, rng, (0.0, 0.0), False)
        if self._sampling.trim_s and total <= reach:
            begin, reach = self._trimmed(word if keep_word else (0, total), total, rng)
        elif keep_word:
            low, high = max(0, word[1] - reach), min(word[0], total - reach)
            begin = int(rng.integers(min(low, high), max(low, high) + 1))
        else:
            begin = int(rng.integers(total - reach + 1))
        begin = min(max(begin, 0), total - reach)
        inside = ((word[0] - begin) / speed / SAMPLE_RATE_HZ, (word[1] - begin) / speed / SAMPLE_RATE_HZ)
        return self._read(clip, begin, reach, speed, size, rng, inside, keep_word)

    def _trimmed(self, keep: tuple[int, int], total: int, rng: np.random.Generator) -> tuple[int, int]:
        """(start, length) of a clip of `total` samples after a random cut at both ends; `keep` stays whole."""
        most = int(self._sampling.trim_s * SAMPLE_RATE_HZ)
        first = int(rng.integers(min(most, max(0, keep[0])) + 1))
        last = total - int(rng.integers(min(most, max(0, total - keep[1])) + 1))
        return first, last - first

    def _read(
        self,
        clip: Clip,
        begin: int,
        reach: int,
        speed: float,
        size: int,
        rng: np.random.Generator,
        word_s: tuple[float, float],
        whole: bool,
    ) -> _Crop:
        samples = change_speed(self._cache.read(clip.path, begin, begin + reach), speed)[:size]
        crop = np.zeros(size, dtype=np.float32)
        room = size - len(samples)
        alone = room > 0 and rng.random() < self._sampling.p_alone
        offset = 0 if alone or room <= 0 else int(rng.integers(room + 1))
        crop[offset : offset + len(samples)] = samples
        shift = offset / SAMPLE_RATE_HZ
        shifted = (word_s[0] + shift, word_s[1] + shift) if whole else (0.0, 0.0)
        return _Crop(crop, crop, len(samples) if alone else size, shifted, whole, begin, offset, speed)


@contextmanager
def cores_for(workers: int) -> Iterator[None]:
    """Leaves a core to each process that prepares batches: on two of them a step of `sotto-micro` took 0.25 s with two
    threads of torch beside one such process, and 0.22 s with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(source: BatchSource, first_step: int, last_step: int, *, workers: int) -> Iterator[Batch]:
    """Batches of steps [first_step, last_step), prepared by `workers` processes."""
    loader: DataLoader[Batch] = DataLoader(
        source,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    yield from loader


def _away_from(word: tuple[int, int], total: int, reach: int, rng: np.random.Generator) -> int | None:
    """A start such that [start, start + reach) misses the word; None where the clip is too short."""
    before, after = word[0] - reach, total - reach - word[1]
    choices = [(0, before), (word[1], word[1] + after)]
    fitting = [(low, high) for low, high in choices if high > low >= 0]
    if not fitting:
        return None
    low, high = fitting[int(rng.integers(len(fitting)))]
    return int(rng.integers(low, high))


def _possible_labels(
    clips: Sequence[Clip], labels: Sequence[str], certain_negatives: Sequence[str]
) -> list[npt.NDArray[np.bool_]]:
    """For each clip the labels (background first) that its annotation says something about.

    A word of the transcript, or any everyday word in untranscribed speech, may be there unmarked; the
    loss must not call it absent.
    """
    certain = {clip.label for clip in clips if clip.corpus in certain_negatives}
    cache: dict[tuple[str, str, str], npt.NDArray[np.bool_]] = {}

    def possible(clip: Clip) -> npt.NDArray[np.bool_]:
        row = np.ones(len(labels) + 1, dtype=np.bool_)
        words = " " + " ".join(re.findall(r"\w+", clip.transcript.lower())) + " "
        untranscribed = not clip.transcript and not clip.keyword
        for index, label in enumerate(labels, start=1):
            language, word = label.split(":", 1)
            if label == clip.label or language != clip.language:
                continue
            if f" {word} " in words or (untranscribed and label not in certain):
                row[index] = False
        return row

    rows = []
    for clip in clips:
        key = (clip.language, clip.label, clip.transcript)
        if key not in cache:
            cache[key] = possible(clip)
        rows.append(cache[key])
    return rows
