"""Make the clips of this folder with espeak-ng. Run by `make examples`; the results are committed.

The voice is one that no training clip uses (training/synthesis.py lists those).
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

HERE = Path(__file__).parent
VOICE = "en-gb-x-gbcwmd"
FIVE_WORDS = ("computer", "alexa", "wildfire", "jarvis", "snowboy")
PAUSE_S = 0.8
# Opus knows neither 22,050 nor 44,100.
OPUS_HZ = 24_000
# Two "people", and what they say: she to be enrolled with and to be recognised by.
PEOPLE = {"ada": "en-gb-x-gbcwmd+Andrea", "ben": "en-gb-x-gbcwmd+Adam"}
SENTENCES = {
    "ada": (
        "I leave the house at seven and walk to the harbour, where the boats come in.",
        "On a clear day you can see the other shore from the window of our kitchen.",
        "Computer. Will there be rain in the morning, or can we walk?",
    ),
    "ben": ("I leave the house at seven and walk to the harbour, where the boats come in.",),
}


def speak(text: str, voice: str, words_per_minute: int = 140) -> tuple[np.ndarray, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.wav")
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-w", str(path), text], check=True)
        samples, rate_hz = soundfile.read(path, dtype="float32")
    return samples, rate_hz


def main() -> None:
    word, rate_hz = speak("computer", VOICE)
    soundfile.write(HERE / "computer.wav", word, rate_hz, subtype="PCM_16")
    for name, voice in PEOPLE.items():
        for number, sentence in enumerate(SENTENCES[name], start=1):
            said, rate_hz = speak(sentence, voice)
            resampled = soxr.resample(said, rate_hz, OPUS_HZ)
            soundfile.write(HERE / f"{name}-{number}.opus", resampled, OPUS_HZ, format="OGG", subtype="OPUS")
    pause = np.zeros(int(PAUSE_S * rate_hz), dtype=np.float32)
    parts = [pause]
    for text in FIVE_WORDS:
        parts += [speak(text, VOICE)[0], pause]
    soundfile.write(HERE / "five-words.wav", np.concatenate(parts), rate_hz, subtype="PCM_16")


if __name__ == "__main__":
    main()
