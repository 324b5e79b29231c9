"""Keywords in audio that is still coming. State of one stream, explicit and bounded; no input or output here.

The clip graph runs over the bundle's `window_s` seconds every `hop_s`. What lies at a window's end may still become
another word, so an event counts once the window goes on after it, or once two windows in a row have seen it; its end is
then what has been heard of it. Each event is told once: what later windows see more of it is not told again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from model_store import KeywordInfo
from service.audio import SAMPLE_RATE_HZ, Samples
from service.keywords import Array, Detection, compatible, detect, window_scores


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to look, and how much has to follow a word; seconds.

    Of hops of 0.2 and 0.25 with windows of 1.2, 1.6 and 2 on the dev split's `spot` and `wake`, none missed less than
    0.25 with the bundle's own 1.6, and what was cheaper had more false alarms.
    """

    hop_s: float = 0.25
    settle_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Window:
    """The newest audio of a stream; `start_s` since the stream began. `last` means that nothing follows."""

    samples: Samples
    start_s: float
    last: bool

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples) / SAMPLE_RATE_HZ


class KeywordStream:
    """Audio in, windows out; their logits in, new detections out, in that order and one after the other."""

    def __init__(
        self,
        info: KeywordInfo,
        pace: Pace,
        *,
        shortest_s: float,
        allowed: npt.NDArray[np.bool_],
        threshold: float | None,
    ) -> None:
        self._info = info
        self._pace = pace
        self._allowed = allowed
        self._threshold = threshold
        frame = round(info.frame_hop_s * SAMPLE_RATE_HZ)
        # Whole frames, so that every window sees the same frames of the same sound.
        self._hop = max(1, round(pace.hop_s * SAMPLE_RATE_HZ / frame)) * frame
        self._window = max(self._hop, round(info.window_s * SAMPLE_RATE_HZ / frame) * frame)
        self._shortest = round(shortest_s * SAMPLE_RATE_HZ)
        self._kept = np.zeros(0, dtype=np.float32)
        self._waiting: list[Samples] = []
        self._waiting_length = 0
        self._heard = 0
        self._told: list[Detection] = []
        self._unsettled: list[Detection] = []

    def push(self, samples: Samples) -> Iterator[Window]:
        """The windows that these samples complete."""
        if len(samples) == 0:
            return
        self._waiting.append(samples)
        self._waiting_length += len(samples)
        if self._waiting_length < self._hop:
            return
        new = np.concatenate(self._waiting)
        whole = len(new) - len(new) % self._hop
        self._waiting, self._waiting_length = [new[whole:]], len(new) - whole
        for start in range(0, whole, self._hop):
            yield self._advance(new[start : start + self._hop], last=False)

    def flush(self) -> Iterator[Window]:
        """The window that ends with the stream, if there is enough for one."""
        rest = np.concatenate([np.zeros(0, dtype=np.float32), *self._waiting])
        self._waiting, self._waiting_length = [], 0
        if len(self._kept) + len(rest) >= self._shortest:
            yield self._advance(rest, last=True)

    def settle(self, window: Window, logits: Array) -> list[Detection]:
        """What the window's logits [T, K] tell that was not told before; times since the stream began."""
        info, length_s = self._info, window.end_s - window.start_s
        fresh, unsettled = [], []
        for event in detect(logits, window_scores(logits, info), info, length_s, self._allowed, self._threshold):
            own = replace(event, start_s=event.start_s + window.start_s, end_s=event.end_s + window.start_s)
            if self._is_told(own):
                continue
            seen = any(own.keyword == other.keyword and _meet(own, other) for other in self._unsettled)
            settled = window.last or event.end_s <= length_s - self._pace.settle_s
            # What the window's beginning cuts is the rest of something that the windows before had whole.
            cut = event.start_s <= 0 and window.start_s > 0
            if seen or (settled and not cut):
                fresh.append(own)
                self._told.append(own)
            elif not cut:
                unsettled.append(own)
        self._unsettled = unsettled
        horizon_s = window.start_s - info.refractory_s
        self._told = [event for event in self._told if event.end_s >= horizon_s]
        return fresh

    def _is_told(self, event: Detection) -> bool:
        for number, other in enumerate(self._told):
            if event.keyword == other.keyword and _meet(event, other):
                self._told[number] = replace(other, end_s=max(other.end_s, event.end_s))
                return True
        return not all(compatible(event, other, self._info.refractory_s) for other in self._told)

    def _advance(self, new: Samples, *, last: bool) -> Window:
        self._heard += len(new)
        self._kept = np.concatenate([self._kept, new])[-self._window :]
        return Window(self._kept, (self._heard - len(self._kept)) / SAMPLE_RATE_HZ, last)


def _meet(one: Detection, other: Detection) -> bool:
    return one.start_s <= other.end_s and other.start_s <= one.end_s
