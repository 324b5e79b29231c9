"""Keywords in audio that is still coming. State of one stream, explicit and bounded; no input or output here.

Two ways to hear it. With the bundle's streaming graph (`FrameStream`) each sound is computed once, and what is known of
it comes later by what the graph looks ahead. Without, the clip graph runs over the bundle's `window_s` seconds every
`hop_s` (`WindowStream`).

Either way the newest stretch is searched for events every `hop_s`. What lies at its end may still become another word,
so an event counts once the stretch goes on after it, or once two stretches in a row have seen it; its end is then what
has been heard of it. Each event is told once: what later stretches see more of it is not told again.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from model_store import KeywordInfo
from model_store.streaming import ENDLESS, Chunk, Progress, StreamingGraph
from service.audio import SAMPLE_RATE_HZ, Samples
from service.keywords import (
    Array,
    Detection,
    candidates,
    compatible,
    detect,
    least_log_odds,
    thresholds_of,
    weigh,
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to look, and how much has to follow a word; seconds.

    Of hops of 0.2 and 0.25 with windows of 1.2, 1.6 and 2 on the dev split's `spot` and `wake`, none missed less than
    0.25 with the bundle's own 1.6, and what was cheaper had more false alarms.
    """

    hop_s: float = 0.25
    settle_s: float = 0.1


# Frames in one call of the streaming graph at most, but for a stream's last: one that is behind, or a file, takes its
# turn with others.
MOST_FRAMES = 40


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a stream; seconds since it began. `last` means that nothing follows."""

    start_s: float
    end_s: float
    last: bool


@dataclass(frozen=True, slots=True)
class Window:
    """The newest audio of a stream, for the clip graph."""

    samples: Samples
    span: Span


@dataclass(frozen=True, slots=True)
class Piece:
    """The next audio of a stream, for the streaming graph; `length` of the stream once it has ended."""

    samples: Samples
    length: int = ENDLESS


class Spotter:
    """From the logits of one stretch after the other, what was not told before."""

    def __init__(self, info: KeywordInfo, pace: Pace, allowed: npt.NDArray[np.bool_], threshold: float | None) -> None:
        self._info = info
        self._pace = pace
        self._allowed = allowed
        self._threshold = thresholds_of(info) if threshold is None else threshold
        self._least = least_log_odds(info, allowed, self._threshold)
        self._told: list[Detection] = []
        self._unsettled: list[Detection] = []

    def likely(self, logits: Array) -> npt.NDArray[np.bool_] | None:
        """Mask [K] of the keywords that a stretch could hold, for what these of its logits [T, 1 + K] say; or None."""
        found = candidates(logits, self._least)
        return found if found.any() else None

    def settle(self, span: Span, logits: Array, likely: npt.NDArray[np.bool_] | None) -> list[Detection]:
        """What the stretch's logits [T, 1 + K] tell that was not told before, of the keywords that are `likely` in it,
        without which they are not looked at; times since the stream began."""
        info, length_s = self._info, span.end_s - span.start_s
        fresh, unsettled = [], []
        found: list[Detection] = []
        if likely is not None:
            found = detect(weigh(logits, info, likely), info, length_s, self._allowed, self._threshold)
        for event in found:
            own = replace(event, start_s=event.start_s + span.start_s, end_s=event.end_s + span.start_s)
            if self._is_told(own):
                continue
            seen = any(own.keyword == other.keyword and _meet(own, other) for other in self._unsettled)
            settled = span.last or event.end_s <= length_s - self._pace.settle_s
            # What the beginning cuts is the rest of something that the stretches before had whole.
            cut = event.start_s <= 0 and span.start_s > 0
            if seen or (settled and not cut):
                fresh.append(own)
                self._told.append(own)
            elif not cut:
                unsettled.append(own)
        self._unsettled = unsettled
        horizon_s = span.start_s - info.refractory_s
        self._told = [event for event in self._told if event.end_s >= horizon_s]
        return fresh

    def _is_told(self, event: Detection) -> bool:
        for number, other in enumerate(self._told):
            if event.keyword == other.keyword and _meet(event, other):
                self._told[number] = replace(other, end_s=max(other.end_s, event.end_s))
                return True
        return not all(compatible(event, other, self._info.refractory_s) for other in self._told)


class _Waiting:
    """Audio until there is enough of it."""

    def __init__(self) -> None:
        self._parts: list[Samples] = []
        self._length = 0

    def add(self, samples: Samples, hop: int) -> Samples:
        """Whole hops of what waits, the oldest first; the rest goes on waiting."""
        if len(samples):
            self._parts.append(samples)
            self._length += len(samples)
        if self._length < hop:
            return np.zeros(0, dtype=np.float32)
        everything = self.take()
        whole = len(everything) - len(everything) % hop
        self._parts, self._length = [everything[whole:]], len(everything) - whole
        return everything[:whole]

    def missing(self, hop: int) -> int:
        """How many samples of the hop are not there yet."""
        return hop - self._length

    def take(self) -> Samples:
        """All of it."""
        everything: Samples = np.concatenate([np.zeros(0, dtype=np.float32), *self._parts])
        self._parts, self._length = [], 0
        return everything


class WindowStream:
    """Audio in, windows out; their logits in, new detections out, in that order and one after the other."""

    def __init__(self, info: KeywordInfo, pace: Pace, spotter: Spotter, *, shortest_s: float) -> None:
        self._spotter = spotter
        frame = round(info.frame_hop_s * SAMPLE_RATE_HZ)
        # Whole frames, so that every window sees the same frames of the same sound.
        self._hop = max(1, round(pace.hop_s * SAMPLE_RATE_HZ / frame)) * frame
        self._window = max(self._hop, round(info.window_s * SAMPLE_RATE_HZ / frame) * frame)
        self._shortest = round(shortest_s * SAMPLE_RATE_HZ)
        self._kept = np.zeros(0, dtype=np.float32)
        self._waiting = _Waiting()
        self._heard = 0

    @property
    def missing(self) -> int:
        """So many samples complete the next window."""
        return self._waiting.missing(self._hop)

    def push(self, samples: Samples) -> Iterator[Window]:
        """The windows that these samples complete."""
        new = self._waiting.add(samples, self._hop)
        for start in range(0, len(new), self._hop):
            yield self._advance(new[start : start + self._hop], last=False)

    def flush(self) -> Iterator[Window]:
        """The window that ends with the stream, if there is enough for one."""
        rest = self._waiting.take()
        if len(self._kept) + len(rest) >= self._shortest:
            yield self._advance(rest, last=True)

    def settle(self, window: Window, logits: Array) -> list[Detection]:
        """What the window's logits [T, K] tell that was not told before."""
        return self._spotter.settle(window.span, logits, self._spotter.likely(logits))

    def _advance(self, new: Samples, *, last: bool) -> Window:
        self._heard += len(new)
        self._kept = np.concatenate([self._kept, new])[-self._window :]
        start_s = (self._heard - len(self._kept)) / SAMPLE_RATE_HZ
        return Window(self._kept, Span(start_s, self._heard / SAMPLE_RATE_HZ, last))


class FrameStream:
    """Audio in, pieces out; each as a chunk to the graph, and what it gives back in, before the next."""

    def __init__(
        self, info: KeywordInfo, pace: Pace, spotter: Spotter, graph: StreamingGraph, *, shortest_s: float
    ) -> None:
        self._spotter = spotter
        self._graph = graph
        self._frame_s = graph.hop / SAMPLE_RATE_HZ
        self._frames = max(1, round(pace.hop_s / self._frame_s))
        self._hop = self._frames * graph.hop
        # As with sliding windows: in a longer stretch, words that follow each other closely are one to `detect`.
        self._keep = max(self._frames, round(info.window_s / self._frame_s))
        self._shortest = round(shortest_s * SAMPLE_RATE_HZ)
        self._waiting = _Waiting()
        self._heard = 0
        self._progress = graph.begin()
        # The newest logits as they came, the oldest first, and what each lot says could be in a stretch with it.
        self._logits: deque[tuple[Array, npt.NDArray[np.bool_] | None]] = deque()
        self._kept = 0
        self._known = 0

    @property
    def missing(self) -> int:
        """So many samples complete the next piece."""
        return self._waiting.missing(self._hop)

    def push(self, samples: Samples) -> Iterator[Piece]:
        """What can be computed with these samples."""
        self._heard += len(samples)
        new = self._waiting.add(samples, self._hop)
        # Many hops at once, or one: streams in real time then share their calls.
        most = max(1, MOST_FRAMES * self._graph.hop // self._hop) * self._hop
        for start in range(0, len(new), most):
            if len(new) - start >= most:
                yield Piece(new[start : start + most])
            else:
                for own in range(start, len(new), self._hop):
                    yield Piece(new[own : own + self._hop])

    def flush(self) -> Iterator[Piece]:
        """What was not computed yet, and the silence that the last frames wait for."""
        rest = self._waiting.take()
        if self._heard < self._shortest:
            return
        frames = max(1, -(-len(rest) // self._graph.hop) + self._graph.info.delay_frames)
        padded = np.zeros(frames * self._graph.hop, dtype=np.float32)
        padded[: len(rest)] = rest
        yield Piece(padded, self._heard)

    def chunk(self, piece: Piece) -> Chunk:
        """For the graph."""
        return Chunk(self._progress, piece.samples, piece.length)

    def settle(self, piece: Piece, logits: Array, progress: Progress) -> list[Detection]:
        """What the graph's logits [T, K] for the piece tell that was not told before."""
        self._progress = progress
        last = piece.length != ENDLESS
        events: list[Detection] = []
        while len(logits):
            # Looked at after the same frames however the audio came.
            count = self._frames - (self._known + self._graph.info.delay_frames) % self._frames
            own, logits = logits[:count], logits[count:]
            events += self._look(own, last=last and not len(logits))
        return events

    def _look(self, logits: Array, *, last: bool) -> list[Detection]:
        self._known += len(logits)
        self._logits.append((logits, self._spotter.likely(logits)))
        self._kept += len(logits)
        while self._kept - len(self._logits[0][0]) >= self._keep:
            self._kept -= len(self._logits.popleft()[0])
        length = min(self._kept, self._keep)
        start_s = (self._known - length) * self._frame_s
        end_s = self._heard / SAMPLE_RATE_HZ if last else self._known * self._frame_s
        # Most of what a microphone hears holds no keyword, which each lot of logits is asked once.
        stretch, likely = logits, None
        if masks := [mask for _, mask in self._logits if mask is not None]:
            likely = functools.reduce(np.logical_or, masks)
            stretch = np.concatenate([own for own, _ in self._logits])[-length:]
        return self._spotter.settle(Span(start_s, end_s, last), stretch, likely)


def _meet(one: Detection, other: Detection) -> bool:
    return one.start_s <= other.end_s and other.start_s <= one.end_s
