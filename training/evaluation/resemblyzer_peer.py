"""Scores given verification trials with Resemblyzer (GE2E, trained on >8 k speakers).

Runs in an environment of its own (`make peers`), since its dependencies are old; hence no import from this
project. Usage: python resemblyzer_peer.py PLAN.json SCORES.npz
"""

import json
import sys

import numpy as np
import soundfile
from resemblyzer import VoiceEncoder, preprocess_wav


def main(plan_path: str, out_path: str) -> None:
    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(path: str) -> np.ndarray:
        samples, rate_hz = soundfile.read(path, dtype="float32")
        wav = preprocess_wav(samples, source_sr=rate_hz)
        # Its voice detector drops all of some short words; the whole clip is the kinder reading.
        return encoder.embed_utterance(wav if len(wav) > rate_hz // 10 else samples)

    with open(plan_path, encoding="utf-8") as stream:
        plans = json.load(stream)
    scores = {}
    for plan in plans:
        profiles = []
        for speaker in plan["speakers"]:
            mean = np.mean([embed(path) for path in plan["enrolments"][speaker]], axis=0)
            profiles.append(mean / np.linalg.norm(mean))
        tests = np.stack([embed(path) for path in plan["tests"]])
        scores[plan["corpus"]] = tests @ np.stack(profiles).T
    np.savez(out_path, **scores)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
