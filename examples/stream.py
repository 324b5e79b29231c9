"""Keywords as they are said: `stream.py FILE` plays a recording in real time, `stream.py -` reads 16-bit PCM at 16 kHz
from a microphone, such as `arecord -q -t raw -f S16_LE -r 16000 -c 1 | stream.py -`. Prints one JSON message a line.
Where the service asks for a key, put it into the environment as API_KEY."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator

import soundfile
import soxr
from websockets.asyncio.client import ClientConnection, connect

RATE_HZ = 16_000
PIECE_S = 0.1
URL = "ws://127.0.0.1:8000"


def pieces(source: str) -> Iterator[bytes]:
    """16-bit PCM, PIECE_S at a time."""
    size = int(PIECE_S * RATE_HZ) * 2
    if source == "-":
        while piece := sys.stdin.buffer.read(size):
            yield piece
        return
    samples, rate_hz = soundfile.read(source, dtype="float32", always_2d=True)
    mono = soxr.resample(samples.mean(axis=1), rate_hz, RATE_HZ)
    data = (mono.clip(-1, 1) * 32767).astype("<i2").tobytes()
    begin = time.monotonic()
    for number, start in enumerate(range(0, len(data), size)):
        time.sleep(max(0.0, begin + number * PIECE_S - time.monotonic()))
        yield data[start : start + size]


async def listen(connection: ClientConnection) -> None:
    async for message in connection:
        print(message, flush=True)  # noqa: T201  the command's output


async def main(source: str, url: str) -> None:
    key = os.environ.get("API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with connect(f"{url}/v1/keywords/stream?rate={RATE_HZ}", additional_headers=headers) as connection:
        listening = asyncio.create_task(listen(connection))
        waiting = pieces(source)
        while (piece := await asyncio.to_thread(next, waiting, None)) is not None:
            await connection.send(piece)
        await connection.send('{"type": "end"}')
        await listening


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else URL))
