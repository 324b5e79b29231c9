"""Embeds recordings with Resemblyzer (GE2E, Wan et al. 2018; trained on >8 k speakers).

Runs in an environment of its own (`make peers`), since its dependencies are old; hence no import from this
project. One process a core. VECTORS.npy is filled in place: a run that was stopped goes on where it was.
Usage: python resemblyzer_teacher.py JOBS.json VECTORS.npy, where a job is [path, speed].
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from resemblyzer import VoiceEncoder, preprocess_wav

_encoder = None


def start() -> None:
    """In each worker."""
    global _encoder
    torch.set_num_threads(1)
    _encoder = VoiceEncoder("cpu", verbose=False)


def embed(job: tuple[int, tuple[str, float]]) -> tuple[int, np.ndarray]:
    row, (path, speed) = job
    samples, rate_hz = soundfile.read(path, dtype="float32")
    if speed != 1.0:
        samples = soxr.resample(samples, speed, 1.0, quality="LQ")  # as training's change_speed does
    wav = preprocess_wav(samples, source_sr=rate_hz)
    # Its voice detector drops all of some short words; the whole clip is the kinder reading.
    return row, _encoder.embed_utterance(wav if len(wav) > rate_hz // 10 else samples)


def main(jobs_file: str, out_file: str) -> None:
    jobs = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    # A file of zeros at first; a row of zeros is one still to do, as embeddings have length 1.
    there = Path(out_file).is_file()
    vectors = np.lib.format.open_memmap(
        out_file, mode="r+" if there else "w+", dtype=np.float32, shape=(len(jobs), 256)
    )
    todo = [(row, job) for row, job in enumerate(jobs) if not vectors[row].any()]
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0)), start) as pool:
        for row, vector in pool.imap_unordered(embed, todo, chunksize=32):
            vectors[row] = vector
    vectors.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
