"""Embeds recordings with Resemblyzer (GE2E, Wan et al. 2018; trained on >8 k speakers).

Runs in an environment of its own (`make peers`), since its dependencies are old; hence no import from this
project. Usage: python resemblyzer_teacher.py PATHS.json VECTORS.npy
"""

import json
import sys

import numpy as np
import soundfile
from resemblyzer import VoiceEncoder, preprocess_wav


def main(paths_file: str, out_file: str) -> None:
    encoder = VoiceEncoder("cpu", verbose=False)
    with open(paths_file, encoding="utf-8") as stream:
        paths = json.load(stream)
    vectors = np.zeros((len(paths), 256), dtype=np.float32)
    for row, path in enumerate(paths):
        samples, rate_hz = soundfile.read(path, dtype="float32")
        wav = preprocess_wav(samples, source_sr=rate_hz)
        # Its voice detector drops all of some short words; the whole clip is the kinder reading.
        vectors[row] = encoder.embed_utterance(wav if len(wav) > rate_hz // 10 else samples)
    np.save(out_file, vectors)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
