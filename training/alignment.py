"""Where in a clip its keyword is.

Corpora with hand-made alignments use them. In the others the clip is the keyword with some silence
around it, so the loudest stretch of speech is taken.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from training.audio_cache import SAMPLE_RATE_HZ, Waveform

FRAME_S = 0.01
SMOOTHING_FRAMES = 5
# Speech starts this far up from the clip's noise floor to its peak, in dB terms: low enough to keep
# weak onsets (f, s, h), high enough to leave room tone out.
ONSET_FRACTION = 0.35
LONGEST_PAUSE_S = 0.25
MARGIN_S = 0.05


def frame_levels_db(waveform: Waveform) -> npt.NDArray[np.float64]:
    """Level of each 10 ms frame in dB re full scale, smoothed over 50 ms; at least one frame."""
    hop = int(FRAME_S * SAMPLE_RATE_HZ)
    count = max(1, len(waveform) // hop)
    frames = np.zeros(count * hop, dtype=np.float64)
    usable = min(len(waveform), count * hop)
    frames[:usable] = waveform[:usable]
    power = np.square(frames.reshape(count, hop)).mean(axis=1)
    kernel = np.ones(min(SMOOTHING_FRAMES, count)) / min(SMOOTHING_FRAMES, count)
    smoothed = np.convolve(power, kernel, mode="same")
    return np.asarray(10 * np.log10(smoothed + 1e-10))


def loudest_speech(waveform: Waveform) -> tuple[float, float]:
    """(start_s, end_s) of the stretch around the loudest frame, pauses up to 0.25 s bridged."""
    levels = frame_levels_db(waveform)
    floor, peak = float(np.percentile(levels, 10)), float(levels.max())
    active = np.flatnonzero(levels >= floor + ONSET_FRACTION * (peak - floor))
    summit = int(np.searchsorted(active, int(levels.argmax())))
    gap = int(LONGEST_PAUSE_S / FRAME_S)
    first = last = min(summit, len(active) - 1)
    while first > 0 and active[first] - active[first - 1] <= gap:
        first -= 1
    while last < len(active) - 1 and active[last + 1] - active[last] <= gap:
        last += 1
    duration_s = len(waveform) / SAMPLE_RATE_HZ
    start_s = max(0.0, float(active[first]) * FRAME_S - MARGIN_S)
    end_s = min(duration_s, (float(active[last]) + 1) * FRAME_S + MARGIN_S)
    return start_s, max(end_s, start_s)
