"""The streaming graph of a bundle: the keyword logits of audio that is still coming, a chunk at a time.

inputs   samples [batch, frames * hop], position [batch] int64, length [batch] int64, state [batch, size]
outputs  keyword_logits [batch, frames, labels], new_state [batch, size]
All but the two integers are float32.

`hop` is the samples in a frame of the logits. `position` says how many frames of the stream were given before, `length`
how many samples it has in all, ENDLESS as long as nobody knows. The logits are those of the frames from
`position - delay_frames` on, and the same as the clip graph gives for the whole: what a stream has to keep is in its
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_store.inference import Session
from model_store.manifest import StreamInfo

ENDLESS = 2**60

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stream is: frames given, and the state after them."""

    position: int
    state: Array


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next samples of a stream, whole frames of them; `length` of the stream, once it is known."""

    progress: Progress
    samples: Array
    length: int = ENDLESS


class StreamingGraph:
    """Runs the graph for several streams at once. Immutable; safe from any thread."""

    def __init__(self, session: Session, info: StreamInfo, *, hop: int) -> None:
        self._session = session
        self.info = info
        self.hop = hop

    def begin(self) -> Progress:
        """Before the first sample."""
        return Progress(0, np.zeros(self.info.state_size, dtype=np.float32))

    def run(self, chunks: Sequence[Chunk]) -> list[tuple[Array, Progress]]:
        """For each of these chunks, which are equally long: the logits [T, K] of the frames that follow those given
        before, T of which differs in the first and last `delay_frames` of a stream, and its progress. Raises ValueError
        where the graph gives something else than it should."""
        positions = np.array([chunk.progress.position for chunk in chunks], dtype=np.int64)
        feeds: dict[str, npt.NDArray[np.generic]] = {
            "samples": np.stack([chunk.samples for chunk in chunks]),
            "position": positions,
            "length": np.array([chunk.length for chunk in chunks], dtype=np.int64),
            "state": np.stack([chunk.progress.state for chunk in chunks]),
        }
        logits, states = self._session.run(["keyword_logits", "new_state"], feeds)
        size, frames = self.info.state_size, len(chunks[0].samples) // self.hop
        if states.shape != (len(chunks), size) or logits.ndim != 3 or logits.shape[:2] != (len(chunks), frames):
            raise ValueError(f"{frames} frames gave logits {logits.shape} and state {states.shape}")
        found = []
        for row, chunk in enumerate(chunks):
            first = chunk.progress.position - self.info.delay_frames
            last = min(first + frames, -(-chunk.length // self.hop))
            own = logits[row, max(0, -first) : max(0, last - first)]
            # Copies: a stream must not keep its neighbours' states alive.
            found.append((own.copy(), Progress(chunk.progress.position + frames, states[row].copy())))
        return found

    def whole(self, waveform: Array, *, frames: int) -> Array:
        """The logits [ceil(N / hop), K] of a clip [N], given in chunks of so many frames."""
        total = -(-len(waveform) // self.hop)
        size = frames * self.hop
        padded = np.zeros(-(-(total + self.info.delay_frames) // frames) * size, dtype=np.float32)
        padded[: len(waveform)] = waveform
        progress, parts = self.begin(), []
        for begin in range(0, len(padded), size):
            # Told only when it is reached, as in life.
            length = len(waveform) if begin + size >= len(waveform) else ENDLESS
            ((logits, progress),) = self.run([Chunk(progress, padded[begin : begin + size], length)])
            parts.append(logits)
        return np.concatenate(parts)
