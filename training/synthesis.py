"""Extra training voices from espeak-ng: every English keyword in many voices, speeds and pitches.

A formant synthesiser sounds like nobody, so these clips train the keyword task only. They never enter
a fold that anything is fitted or measured on.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile

from training.bounds import Count
from training.errors import TrainingError
from training.manifest import Clip

CORPUS = "espeak"
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "en-us-nyc")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f5")


@dataclass(frozen=True, slots=True)
class SynthesisRecipe:
    """How many voices read each word, and for which languages."""

    voices: Count = 24
    languages: tuple[str, ...] = ("en",)


def synthesize(recipe: SynthesisRecipe, labels: Sequence[str], folder: Path, *, seed: int) -> list[Clip]:
    """One clip for each label and voice, made in `folder` where not there yet.

    Raises TrainingError when espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise TrainingError(
            "espeak-ng is not installed; install it (Debian: espeak-ng) or take `synthesis` out of the recipe"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [label for label in labels if label.split(":", 1)[0] in recipe.languages]
    jobs = [(label, voice) for label in wanted for voice in range(recipe.voices)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: _clip(folder, job[0], job[1], seed), jobs))


def speak(text: str, path: Path, *, voice: str, words_per_minute: int, pitch: int) -> None:
    """Write `text` as WAV; pitch 0 to 99. Raises TrainingError."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "-w", str(path), text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TrainingError(f"{' '.join(command)}: {done.stderr.strip()}")


def _clip(folder: Path, label: str, voice: int, seed: int) -> Clip:
    language, word = label.split(":", 1)
    draw = hashlib.sha256(f"{seed}:{label}:{voice}".encode()).digest()
    accent = ACCENTS[voice % len(ACCENTS)]
    name = f"{accent}+{VARIANTS[voice % len(VARIANTS)]}"
    path = folder / f"{label.replace(':', '_').replace(' ', '_')}-{voice:02d}-{draw[:4].hex()}.wav"
    if not path.is_file():
        partial = path.with_suffix(".partial.wav")
        speak(word, partial, voice=name, words_per_minute=110 + draw[4] % 90, pitch=20 + draw[5] % 60)
        partial.replace(path)
    return Clip(
        path=path,
        key=f"{CORPUS}/{path.name}",
        corpus=CORPUS,
        split="train",
        speaker="",
        keyword=word,
        transcript=word,
        language=language,
        duration_s=float(soundfile.info(path).duration),
    )
