"""Many microphones at once: `python -m benchmarks.streams PORT FILE --streams N` prints delays as JSON.

Raw WebSocket frames over asyncio's transports, so that hundreds of streams take little of the cores they share. Each
stream sends 125 ms of audio every 125 ms (`--piece-s`) and, once a second, a ping after a piece that completes a
window; the server handles a stream's messages in order, so the pong says that everything the audio completed has been
told. The delay is from the audio to the pong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from pathlib import Path

import numpy as np
import soundfile
import soxr
import uvloop

from benchmarks.load import until

RATE_HZ = 16_000
PIECE_S = 0.125
# Whole hops of the service's, so that every ping follows a piece that has it compute. Not every such piece has one,
# or pings would be a third of all messages, and no microphone sends them.
PING_EVERY_S = 1.0
MASK = bytes(4)  # of zeros: the payload goes as it is
KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole client frame."""
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        return head + bytes([0x80 | len(payload)]) + MASK + payload
    return head + bytes([0x80 | 126]) + len(payload).to_bytes(2, "big") + MASK + payload


PING = frame(1, b'{"type": "ping"}')


class Microphone(asyncio.Protocol):
    """One stream, looping over `audio` from a place of its own."""

    def __init__(self, audio: bytes, offset: int, piece_s: float, begin: float, end: float) -> None:
        self._audio, self._place, self._piece_s = audio, offset, piece_s
        self._begin, self._end = begin, end
        self._sent: deque[float] = deque()
        self._received = b""
        self.opened = asyncio.get_running_loop().create_future()
        self.delays_s: list[float] = []
        self.detections = 0
        self.lost = False
        self._done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(
            f"GET /v1/keywords/stream?rate={RATE_HZ} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self.opened.done():
            head, found, rest = self._received.partition(b"\r\n\r\n")
            if not found:
                return
            self._received = rest
            self.opened.set_result(b" 101 " in head)
        while len(self._received) >= 2:
            length, start = self._received[1] & 0x7F, 2
            if length == 126:
                length, start = int.from_bytes(self._received[2:4], "big"), 4
            if len(self._received) < start + length:
                return
            opcode, payload = self._received[0] & 0x0F, self._received[start : start + length]
            self._received = self._received[start + length :]
            if opcode == 9:
                self._transport.write(frame(10, payload))
            elif b'"pong"' in payload:
                sent, now = self._sent.popleft(), time.perf_counter()
                if self._begin <= sent and now <= self._end:
                    self.delays_s.append(now - sent)
            elif b'"detection"' in payload:
                self.detections += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's
        self.lost = not self._done
        if not self.opened.done():
            self.opened.set_result(False)

    @property
    def unanswered(self) -> list[float]:
        """When what waits for its pong was sent; what went out a moment before the end is not counted."""
        return [sent for sent in self._sent if sent < self._end - PIECE_S]

    async def speak(self) -> None:
        if not await self.opened:
            self.lost = True
            return
        size, pieces_a_ping = int(self._piece_s * RATE_HZ) * 2, round(PING_EVERY_S / self._piece_s)
        due, number = time.perf_counter(), 0
        while due < self._end and not self.lost:
            await until(due)
            if self._place + size > len(self._audio):
                self._place = 0
            message = frame(2, self._audio[self._place : self._place + size])
            self._place += size
            if number % pieces_a_ping == pieces_a_ping - 1:
                self._sent.append(time.perf_counter())
                message += PING
            self._transport.write(message)
            number, due = number + 1, due + self._piece_s
        self._done = not self.lost
        self._transport.close()


async def run(
    port: int, audio: bytes, streams: int, piece_s: float, warm_up_s: float, measure_s: float
) -> dict[str, float]:
    """p50 and p99 of the delay in milliseconds, and what was lost."""
    loop = asyncio.get_running_loop()
    # They open spread over the warm-up's first half, as people do not speak in step.
    begin = time.perf_counter() + warm_up_s
    end = begin + measure_s
    rng = np.random.default_rng(0)
    microphones: list[Microphone] = []

    async def one() -> None:
        await asyncio.sleep(float(rng.uniform(0, warm_up_s / 2)))
        offset = int(rng.integers(len(audio) // 2)) * 2
        _, microphone = await loop.create_connection(
            lambda: Microphone(audio, offset, piece_s, begin, end), "127.0.0.1", port
        )
        microphones.append(microphone)
        await microphone.speak()

    await asyncio.gather(*(one() for _ in range(streams)))
    delays_s = [delay for microphone in microphones for delay in microphone.delays_s]
    # Not answered by the end: so long at least.
    delays_s += [end - sent for microphone in microphones for sent in microphone.unanswered if begin <= sent]
    delays_ms = np.array(delays_s) * 1e3
    p50, p99 = np.percentile(delays_ms, [50, 99]) if len(delays_ms) else (float("inf"), float("inf"))
    return {
        "streams": streams,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "measured": len(delays_ms),
        "detections": sum(microphone.detections for microphone in microphones),
        "lost": sum(microphone.lost for microphone in microphones),
    }


# Before anything is measured, and while it is.
WARM_UP_S, MEASURE_S = 4.0, 10.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--piece-s", type=float, default=PIECE_S)
    parser.add_argument("--warm-up-s", type=float, default=WARM_UP_S)
    parser.add_argument("--measure-s", type=float, default=MEASURE_S)
    given = parser.parse_args()
    samples, rate_hz = soundfile.read(given.file, dtype="float32")
    audio = (soxr.resample(samples, rate_hz, RATE_HZ).clip(-1, 1) * 32767).astype("<i2").tobytes()
    result = uvloop.run(run(given.port, audio, given.streams, given.piece_s, given.warm_up_s, given.measure_s))
    print(json.dumps(result))  # noqa: T201  the output is the interface


if __name__ == "__main__":
    main()
