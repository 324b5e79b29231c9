"""A closed-loop HTTP load generator: N clients on kept-alive connections, each sending its next request
when the last was answered. Raw sockets on asyncio, so that it takes little of the cores it shares."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Result:
    """Of the measured time only; latencies in milliseconds."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failures: int


async def run(host: str, port: int, request: bytes, *, clients: int, warm_up_s: float, measure_s: float) -> Result:
    """Answers other than 200 count as failures."""
    begin = time.perf_counter() + warm_up_s
    end = begin + measure_s
    latencies: list[float] = []
    failures = 0

    async def client() -> None:
        nonlocal failures
        reader, writer = await asyncio.open_connection(host, port)
        while (start := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            done = time.perf_counter()
            if begin <= start and done <= end:
                latencies.append(done - start)
                failures += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    times = np.array(latencies) * 1e3
    return Result(len(times) / measure_s, float(np.percentile(times, 50)), float(np.percentile(times, 99)), failures)


def post(path: str, body: bytes, content_type: str) -> bytes:
    """The bytes of one request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    """`python -m benchmarks.load PORT PATH FILE`: prints the result as JSON, for the benchmarks to read."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("file")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--warm-up-s", type=float, default=2.0)
    parser.add_argument("--measure-s", type=float, default=8.0)
    options = parser.parse_args()
    with open(options.file, "rb") as stream:
        request = post(options.path, stream.read(), "audio/wav")
    result = asyncio.run(
        run(
            "127.0.0.1",
            options.port,
            request,
            clients=options.clients,
            warm_up_s=options.warm_up_s,
            measure_s=options.measure_s,
        )
    )
    print(json.dumps(asdict(result)))  # noqa: T201  the output is the interface


if __name__ == "__main__":
    main()
