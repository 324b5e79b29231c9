"""An HTTP load generator on raw sockets, so that it takes little of the cores it shares.

Closed loop: N clients, each of which sends its next request when the last was answered. Open loop: requests at a given
rate, whether or not the last ones were answered; a latency then counts from the moment a request was due, so a server
that stalls cannot hide it (Tene's coordinated omission).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import uvloop

STAGE = re.compile(rb"(\w+);dur=([0-9.]+)")
# More than these under way at once are not begun: an overloaded machine would measure its own client.
MOST_UNDER_WAY = 2000
PATIENCE_S = 10.0
UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True)
class Kind:
    """What was asked for in one kind of request; times in milliseconds, of answers with status 200."""

    answered: int
    p50_ms: float
    p99_ms: float
    server_p50_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """Of the measured time only."""

    seconds: float
    kinds: dict[str, Kind]
    statuses: dict[str, int]  # "-1": the connection broke
    in_time: int  # answered with 200 within the deadline

    @property
    def requests_per_s(self) -> float:
        return self.statuses.get("200", 0) / self.seconds

    @property
    def failures(self) -> int:
        return sum(count for status, count in self.statuses.items() if status != "200")

    @classmethod
    def from_json(cls, text: str) -> Result:
        given = json.loads(text)
        return cls(**{**given, "kinds": {name: Kind(**kind) for name, kind in given["kinds"].items()}})


@dataclass
class Tally:
    """What the clients saw of requests that were due from `begin` to `end`; those not answered by then are failures,
    or a server that stalls would look the better for it."""

    begin: float
    end: float
    deadline_s: float
    times_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    statuses: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    in_time: int = 0
    sent: int = 0

    def begun(self, due: float) -> None:
        self.sent += self.begin <= due < self.end

    def add(self, kind: str, due: float, status: int, head: bytes) -> None:
        done = time.perf_counter()
        if not self.begin <= due < self.end:
            return
        self.statuses[str(status)] += 1
        if status != 200:
            return
        self.times_s[kind].append(done - due)
        self.in_time += done - due <= self.deadline_s
        for name, duration in STAGE.findall(head):
            self.stages[kind][name.decode()].append(float(duration))

    def result(self) -> Result:
        kinds = {}
        for kind, times_s in self.times_s.items():
            p50, p99 = np.percentile(np.array(times_s) * 1e3, [50, 99])
            server = {name: float(np.median(values)) for name, values in self.stages[kind].items()}
            kinds[kind] = Kind(len(times_s), float(p50), float(p99), server)
        unanswered = self.sent - sum(self.statuses.values())
        if unanswered:
            self.statuses[UNANSWERED] += unanswered
        return Result(self.end - self.begin, kinds, dict(self.statuses), self.in_time)


class Connection:
    """Kept alive; opened again after it broke."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """(status, head) of the answer; status -1 where there was none."""
        try:
            if self._streams is not None and self._streams[0].at_eof():
                # The server closed it while it was idle, as servers do.
                self.close()
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host, self._port)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        # uvloop's word for writing to what has broken.
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            self.close()
            return -1, b""
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1]), head

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def until(due: float) -> None:
    """Sleep until then, on `time.perf_counter`'s clock. uvloop's timers know whole milliseconds and may be early."""
    await asyncio.sleep(0)
    while (left_s := due - time.perf_counter()) > 0:
        await asyncio.sleep(math.ceil(1e3 * left_s) / 1e3)


async def closed_loop(host: str, port: int, requests: list[tuple[str, bytes]], tally: Tally, clients: int) -> None:
    """Each client takes the kinds in turn, beginning elsewhere."""

    async def client(number: int) -> None:
        connection, turn = Connection(host, port), number
        while (start := time.perf_counter()) < tally.end:
            kind, request = requests[turn % len(requests)]
            turn += 1
            tally.begun(start)
            tally.add(kind, start, *await connection.exchange(request))
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))


async def open_loop(host: str, port: int, requests: list[tuple[str, bytes]], tally: Tally, rate: float) -> None:
    """Poisson arrivals at `rate` a second, the kinds in turn."""
    rng = np.random.default_rng(0)
    idle: list[Connection] = []
    under_way: set[asyncio.Task[None]] = set()

    async def one(kind: str, request: bytes, due: float) -> None:
        connection = idle.pop() if idle else Connection(host, port)
        tally.add(kind, due, *await connection.exchange(request))
        idle.append(connection)

    due, turn = time.perf_counter(), 0
    while due < tally.end:
        await until(due)
        tally.begun(due)
        if len(under_way) < MOST_UNDER_WAY:
            task = asyncio.create_task(one(*requests[turn % len(requests)], due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        turn += 1
        due += float(rng.exponential(1 / rate))
    if under_way:
        await asyncio.wait(under_way, timeout=PATIENCE_S)
    for connection in idle:
        connection.close()


def post(path: str, body: bytes, *, content_type: str, headers: str = "") -> bytes:
    """The bytes of one request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    """`python -m benchmarks.load PORT PATH FILE...`: prints the result as JSON. A file given
    twice is sent twice as often."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--content-type", default="audio/wav")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--deadline-ms", type=int, default=0)
    parser.add_argument("--warm-up-s", type=float, default=2.0)
    parser.add_argument("--measure-s", type=float, default=8.0)
    given = parser.parse_args()
    headers = f"X-Request-Timeout-Ms: {given.deadline_ms}\r\n" if given.deadline_ms else ""
    requests = [
        (file.stem, post(given.path, file.read_bytes(), content_type=given.content_type, headers=headers))
        for file in given.files
    ]
    begin = time.perf_counter() + given.warm_up_s
    tally = Tally(begin, begin + given.measure_s, given.deadline_ms / 1e3 or float("inf"))
    if given.rate:
        uvloop.run(open_loop("127.0.0.1", given.port, requests, tally, given.rate))
    else:
        uvloop.run(closed_loop("127.0.0.1", given.port, requests, tally, given.clients))
    print(json.dumps(asdict(tally.result())))  # noqa: T201  the output is the interface


if __name__ == "__main__":
    main()
