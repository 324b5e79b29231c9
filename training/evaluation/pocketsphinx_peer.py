"""Looks for words in recordings with PocketSphinx in its keyword mode, and says how sure it was of each.

Runs in an environment of its own (`make peers`); hence no import from this project. One process a core.
Usage: python pocketsphinx_peer.py PLAN.json FOUND.json
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import soundfile
from pocketsphinx import Decoder

RATE_HZ = 16_000
# So low that nearly everything is a candidate: what counts is decided by who reads the scores.
THRESHOLD = 1e-50
# Not in its dictionary.
PRONUNCIATIONS = {"snowboy": "S N OW B OY"}
# A word is told some frames after its end.
TAIL_S = 0.5

_decoder = None


def start(words: list[str]) -> None:
    """In each worker."""
    global _decoder
    _decoder = Decoder(lm=None, loglevel="ERROR")
    for word in {part for phrase in words for part in phrase.split()}:
        if _decoder.lookup_word(word) is None:
            if word not in PRONUNCIATIONS:
                raise ValueError(f"PocketSphinx does not know how {word!r} is pronounced; say so in {__file__}")
            _decoder.add_word(word, PRONUNCIATIONS[word], True)
    with tempfile.NamedTemporaryFile("w", suffix=".list") as listed:
        listed.writelines(f"{phrase} /{THRESHOLD:g}/\n" for phrase in words)
        listed.flush()
        _decoder.add_kws("words", listed.name)
    _decoder.activate_search("words")


def find(path: str) -> dict[str, list[float]]:
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if rate_hz != RATE_HZ:
        import librosa

        mono = librosa.resample(mono, orig_sr=rate_hz, target_sr=RATE_HZ)
    # Not digital silence, which it has never heard.
    tail = np.random.default_rng(0).integers(-3, 4, round(TAIL_S * RATE_HZ)).astype(np.int16)
    pcm = np.concatenate([(np.clip(mono, -1, 1) * 32767).astype(np.int16), tail])
    _decoder.start_utt()
    # As one utterance, so that the mean of its spectrum is known from the beginning.
    _decoder.process_raw(pcm.tobytes(), no_search=False, full_utt=True)
    _decoder.end_utt()
    found = defaultdict(list)
    if _decoder.hyp() is not None:
        for segment in _decoder.seg():
            found[segment.word.strip()].append(segment.prob)
    return found


def main(plan_file: str, out_file: str) -> None:
    with open(plan_file, encoding="utf-8") as stream:
        plan = json.load(stream)
    context = multiprocessing.get_context("spawn")
    # Unlike multiprocessing's own pool it gives up where `start` fails.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, start, (plan["words"],)) as pool:
        found = list(pool.map(find, plan["files"], chunksize=32))
    with open(out_file, "w", encoding="utf-8") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
