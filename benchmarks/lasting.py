"""What becomes of the service when there is too much, too slow, or for long."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from matplotlib.figure import Figure

from benchmarks.clients import CLIENTS, CPUS, ROUNDS, Setting, clip, load, median
from benchmarks.load import Result
from benchmarks.servers import sotto
from model_store import LocalStore

TRICKLING = 500
DEADLINE_MS = 1000


def overload(setting: Setting) -> list[str]:
    """Twice as much as it can do."""
    one = clip(setting.folder, 1.0, "one")
    with sotto(setting.bundle) as server:
        capacity = load(server, [one], clients=CLIENTS, measure_s=6).requests_per_s
        with _probing(server.port) as times_s:
            found = load(server, [one], rate=2 * capacity, deadline_ms=DEADLINE_MS, measure_s=10)
    # Whatever was not turned away at once.
    accepted = sum(count for status, count in found.statuses.items() if status != "503")
    statuses = ", ".join(f"{count} of {status}" for status, count in sorted(found.statuses.items()))
    return [
        "## overload",
        "",
        f"Capacity {capacity:.0f} requests/s; at {2 * capacity:.0f} offered, with a deadline of {DEADLINE_MS} ms, "
        f"{found.in_time / found.seconds:.0f}/s are answered in time, {found.in_time / found.seconds / capacity:.0%} "
        "of "
        f"capacity (bar: 90 %), and {found.in_time / max(1, accepted):.1%} of those accepted within the deadline; "
        f"p99 of the accepted {found.kinds['one'].p99_ms:.0f} ms. "
        f"Answers: {statuses}; those never answered would count as accepted. "
        f"{len(times_s)} probes meanwhile, each on a connection of its own: {max(times_s) * 1e3:.0f} ms at most.",
    ]


@contextmanager
def _probing(port: int) -> Iterator[list[float]]:
    """How long `/readyz` took, asked five times a second as long as this lasts; a failure is raised."""
    times_s: list[float] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.2):
            begin = time.perf_counter()
            try:
                httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30).raise_for_status()
            except httpx.HTTPError as error:
                failures.append(error)
                return
            times_s.append(time.perf_counter() - begin)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield times_s
    finally:
        stop.set()
        asking.join()
    if failures:
        raise failures[0]


def trickle(setting: Setting) -> list[str]:
    """Clients that send a byte a second."""
    one = clip(setting.folder, 1.0, "one")
    with sotto(setting.bundle) as server:
        rate = 0.3 * load(server, [one], clients=CLIENTS, measure_s=5).requests_per_s
        before = median(load(server, [one], rate=rate).kinds["one"].p99_ms for _ in range(ROUNDS))
        with _trickling(server.port, TRICKLING) as alive:
            during = [load(server, [one], rate=rate) for _ in range(ROUNDS)]
            still = alive()
    after = median(found.kinds["one"].p99_ms for found in during)
    failures = sum(found.failures for found in during)
    return [
        "## slow clients",
        "",
        f"{TRICKLING} connections that send a byte of their head each second, opened anew when the service closes them "
        f"({still} were open at the end): p99 of others at {rate:.0f} requests/s {before:.1f} ms before, {after:.1f} "
        "ms "
        f"meanwhile, {after / before:.2f} times (bar: 2), {failures} failures.",
    ]


def moves(setting: Setting) -> list[str]:
    """The default model's alias, moved to and fro under load."""
    one = clip(setting.folder, 1.0, "one")
    store = LocalStore(setting.folder / "store")
    files = {name: setting.bundle.read(name) for name in setting.bundle.manifest.files}
    bundles = [store.publish(setting.bundle.manifest, files) for _ in range(2)]
    name = setting.bundle.manifest.name
    store.set_alias(name, "production", 1)
    resident = []
    with sotto(bundles[0]) as server:
        url = f"http://127.0.0.1:{server.port}/v1/models/{name}/aliases/production"
        found: list[Result] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                found.append(load(server, [one], clients=2, warm_up_s=0, measure_s=5))

        asking = threading.Thread(target=ask)
        asking.start()
        begin = time.perf_counter()
        for number in range(setting.moves):
            httpx.post(url, json={"version": 1 + (number + 1) % 2}, timeout=60).raise_for_status()
            resident.append(server.resident_bytes / 1e6)
        took_s = time.perf_counter() - begin
        stop.set()
        asking.join()
    requests = sum(sum(result.statuses.values()) for result in found)
    # Whether the old network is gone when one looks is chance; a tenth's median is not.
    tenths = [median(each) for each in np.array_split(resident, 10)]
    return [
        "## moves",
        "",
        f"{setting.moves} moves of the alias under load, {took_s / setting.moves:.2f} s each: {requests} requests "
        "meanwhile, "
        f"{_failures(found, 'failed')}. Resident, MB, the median of each tenth of the moves: "
        f"{', '.join(f'{size:.0f}' for size in tenths)}; {max(resident):.0f} at most.",
    ]


def _failures(results: Iterable[Result], word: str) -> str:
    """How many, and what they were answered: -1 is a connection that broke."""
    statuses = sum((Counter(result.statuses) for result in results), Counter[str]())
    del statuses["200"]
    counts = ", ".join(f"{status} {count} times" for status, count in statuses.items())
    return f"{statuses.total()} {word}" + (f" ({counts})" if counts else "")


def soak(setting: Setting) -> list[str]:
    """Memory over a long time of mixed load."""
    files = [clip(setting.folder, seconds, f"s{seconds:g}") for seconds in (0.5, 1.0, 1.0, 2.0, 4.0, 15.0)]
    curve: list[tuple[float, float]] = []
    with sotto(setting.bundle) as server:
        rate = 0.6 * load(server, files, clients=CLIENTS, measure_s=10).requests_per_s
        stop = threading.Event()
        begin = time.perf_counter()

        def watch() -> None:
            while not stop.wait(2.0):
                curve.append((time.perf_counter() - begin, server.resident_bytes / 1e6))

        watching = threading.Thread(target=watch)
        watching.start()
        found = load(server, files, rate=rate, measure_s=setting.soak_s)
        stop.set()
        watching.join()
    early = median(size for at, size in curve if at < 0.1 * setting.soak_s)
    late = median(size for at, size in curve if at > 0.9 * setting.soak_s)
    _plot_memory(curve, setting.plots / "memory.png")
    return [
        "## soak",
        "",
        f"{setting.soak_s / 60:.0f} minutes of clips of 0.5 to 15 s at {rate:.0f}/s, six tenths of what was possible "
        f"at the start on {CPUS} core{'s' * (CPUS > 1)}: {early:.0f} MB resident in the first tenth, {late:.0f} MB in "
        f"the last, {late / early - 1:+.1%} (bar: within 3 %); of "
        f"{sum(found.statuses.values())} requests {_failures([found], 'failed')}.",
        "",
        "![resident memory](memory.png)",
    ]


@contextmanager
def _trickling(port: int, count: int) -> Iterator[Callable[[], int]]:
    """`count` connections that each send a byte a second; yields how many are open now."""
    stop = threading.Event()
    head = b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"a" * 10_000
    connections: list[socket.socket | None] = [None] * count
    places = [0] * count

    def work() -> None:
        while not stop.is_set():
            round_began = time.monotonic()
            for number in range(count):
                connection = connections[number]
                try:
                    if connection is None:
                        connection = connections[number] = socket.create_connection(("127.0.0.1", port), timeout=1)
                        places[number] = 0
                    connection.send(head[places[number] : places[number] + 1])
                    places[number] += 1
                    connection.setblocking(False)
                    if not connection.recv(1024):
                        raise ConnectionError
                except BlockingIOError:
                    continue
                except OSError:
                    if connection is not None:
                        connection.close()
                    connections[number] = None
            stop.wait(max(0.0, 1.0 - (time.monotonic() - round_began)))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        time.sleep(3.0)
        yield lambda: sum(connection is not None for connection in connections)
    finally:
        stop.set()
        thread.join()
        for connection in connections:
            if connection is not None:
                connection.close()


def _plot_memory(curve: list[tuple[float, float]], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([at / 60 for at, _ in curve], [size for _, size in curve])
    axes.set(xlabel="minutes", ylabel="resident, MB", ylim=(0, None))
    figure.savefig(path, dpi=120)
