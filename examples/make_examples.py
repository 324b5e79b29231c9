"""Make the clips of this folder with espeak-ng. Run by `make examples`; the results are committed.

The voice is one that no training clip uses (training/synthesis.py lists those).
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

HERE = Path(__file__).parent
VOICE = "en-gb-x-gbcwmd"
FIVE_WORDS = ("computer", "alexa", "wildfire", "jarvis", "snowboy")
PAUSE_S = 0.8


def speak(text: str, voice: str, words_per_minute: int = 140) -> tuple[np.ndarray, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.wav")
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-w", str(path), text], check=True)
        samples, rate_hz = soundfile.read(path, dtype="float32")
    return samples, rate_hz


def main() -> None:
    word, rate_hz = speak("computer", VOICE)
    soundfile.write(HERE / "computer.wav", word, rate_hz, subtype="PCM_16")
    pause = np.zeros(int(PAUSE_S * rate_hz), dtype=np.float32)
    parts = [pause]
    for text in FIVE_WORDS:
        parts += [speak(text, VOICE)[0], pause]
    soundfile.write(HERE / "five-words.wav", np.concatenate(parts), rate_hz, subtype="PCM_16")


if __name__ == "__main__":
    main()
