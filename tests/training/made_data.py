"""A small folder of data with made-up voices, and a recipe that trains on it within seconds.

Two corpora of nine training speakers and two dev speakers each. A speaker is a pitch and a resonance of the
head, a word is a path of its formant: enough for a network of a few thousand weights to tell apart.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile

from tests.conftest import SAMPLE_RATE_HZ, Samples
from training.manifest import COLUMNS, RECORDING_COLUMNS
from training.recipe import Recipe

# Formant in Hz at the word's start and end.
WORDS = {
    "asc": ("ar", {"rising": (500.0, 2200.0), "low": (600.0, 600.0)}),
    "gsc": ("en", {"falling": (2200.0, 500.0), "high": (2400.0, 2400.0)}),
}
TRAIN_SPEAKERS, DEV_SPEAKERS, CLIPS_EACH = 9, 2, 10
WORD_S, CLIP_S = 0.5, 1.0

TINY_SHAPE = {
    "mels": 32, "stem_channels": 8, "early_width": 16, "early_blocks": 1, "early_kernel": 3, "shared_width": 24,
    "shared_blocks": 1, "task_width": 32, "keyword_blocks": 1, "speaker_blocks": 1, "kernel": 5, "speaker_dim": 16,
}  # fmt: skip


def spoken(formant_hz: tuple[float, float], *, pitch_hz: float, resonance_hz: float, seed: int) -> Samples:
    """One second of a made voice: the word somewhere inside, a quiet hiss around it."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(int(WORD_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    place = time_s / WORD_S
    pitch = pitch_hz * rng.uniform(0.97, 1.03) * (1 + 0.03 * np.sin(2 * np.pi * 3 * time_s))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE_HZ
    formant = formant_hz[0] + (formant_hz[1] - formant_hz[0]) * place
    harmonics = np.arange(1, int(7000 / pitch_hz))[:, None]
    gain = 0.1 / harmonics + sum(
        np.exp(-(((harmonics * pitch - peak) / 350.0) ** 2)) for peak in (formant, resonance_hz)
    )
    # Two syllables.
    word = 0.05 * (gain * np.sin(harmonics * phase)).sum(axis=0) * np.abs(np.sin(2 * np.pi * place))
    clip = 0.0005 * rng.standard_normal(int(CLIP_S * SAMPLE_RATE_HZ))
    start = int(rng.uniform(0.1, CLIP_S - WORD_S - 0.1) * SAMPLE_RATE_HZ)
    clip[start : start + len(word)] += word
    return clip.astype(np.float32)


def write_data(root: Path) -> Path:
    """Tables and WAV files below `root`."""
    rows = [row for corpus in WORDS for row in _corpus(root, corpus)]
    write_table(root / "manifest.csv", COLUMNS, rows)
    rng = np.random.default_rng(1)
    noises, rooms = [], []
    for split in ("train", "dev"):
        write_wav(root / f"noise/{split}.wav", (0.05 * rng.standard_normal(3 * SAMPLE_RATE_HZ)).astype(np.float32))
        noises.append((f"noise/{split}.wav", "made", split, "hiss", "3.000", "CC0"))
    decay = np.exp(-np.arange(4000) / 800) * rng.standard_normal(4000) * 0.05
    decay[40] = 1.0
    write_wav(root / "rir/train.wav", decay.astype(np.float32))
    rooms.append(("rir/train.wav", "made", "train", "room", "0.250", "CC0"))
    write_table(root / "noise.csv", RECORDING_COLUMNS, noises)
    write_table(root / "rir.csv", RECORDING_COLUMNS, rooms)
    return root


def write_wav(path: Path, samples: Samples, *, rate_hz: int = SAMPLE_RATE_HZ) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz, subtype="PCM_16")


def write_table(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])


def tiny_recipe(root: Path, **schedule: object) -> Recipe:
    """Thirty steps of the smallest network on corpora `asc` and `gsc`; `schedule` overrides its part."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 7,
            "data": {
                "root": root,
                "calibration_fraction": 0.1,
                "corpora": ["asc", "gsc"],
                "most_clips_per_corpus": 40,
            },
            "shape": TINY_SHAPE,
            "sampling": {"crop_s": 1.0},
            "augment": {"snr_db": [10.0, 30.0]},
            "schedule": {
                "steps": 30,
                "batch_size": 16,
                "warmup_steps": 5,
                "peak_learning_rate": 0.01,
                "average_decay": 0.9,
                "checkpoint_every": 10,
                "workers": 0,
                **schedule,
            },
        }
    )


def _corpus(root: Path, corpus: str) -> list[tuple[str, ...]]:
    language, words = WORDS[corpus]
    rows = []
    for number in range(TRAIN_SPEAKERS + DEV_SPEAKERS):
        split = "train" if number < TRAIN_SPEAKERS else "dev"
        pitch_hz, resonance_hz = 100.0 + 10.0 * number, 3000.0 + 300.0 * ((number * 7) % 11)
        for take in range(CLIPS_EACH):
            word, formant_hz = list(words.items())[take % len(words)]
            key = f"{corpus}/{number:02d}/{word}-{take}.wav"
            seed = int.from_bytes(f"{corpus[0]}{number}{take}".encode(), "big")
            write_wav(root / key, spoken(formant_hz, pitch_hz=pitch_hz, resonance_hz=resonance_hz, seed=seed))
            speaker = f"{corpus}_{number:02d}"
            rows.append((key, corpus, split, speaker, word, word, language, f"{CLIP_S:.3f}", "CC0"))
    return rows
