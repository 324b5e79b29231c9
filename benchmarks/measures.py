"""How fast the service is, by itself and beside others. Each function returns a section of the report."""

from __future__ import annotations

import json
import os
import pstats
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.clients import CLIENTS, CPUS, RATE_HZ, ROUNDS, Setting, clip, load, median
from benchmarks.load import Result
from benchmarks.servers import PEERS, Server, empty, installed, peer, sotto
from benchmarks.streams import MEASURE_S as STREAMS_MEASURE_S
from benchmarks.streams import PIECE_S
from benchmarks.streams import WARM_UP_S as STREAMS_WARM_UP_S
from model_store import Bundle
from model_store.graph import part_of
from model_store.whole import open_clips
from service.engine import PARTS, Part
from service.probe import calls_per_s

BARE_LOOP_S = 5.0
WARM_UP_S, MEASURE_S = 2.0, 8.0
PROFILE_ROWS = 14
OFFERED = (50, 100, 200, 300, 400, 500, 600)
STREAMS = (50, 100, 150, 200, 250, 300, 350, 400)
SMALL_STREAMS = (100, 200, 300, 400)
STREAM_DELAY_MS = 300.0


def overhead(setting: Setting) -> list[str]:
    """Requests a second against a bare loop on the same graph and cores."""
    one = clip(setting.folder, 1.0, "one")
    bare: list[float] = []
    ours: list[Result] = []
    by_wrk: list[float] = []
    costs: list[tuple[float, float, float]] = []
    floor: list[float] = []
    for _ in range(ROUNDS):
        bare.append(_bare_loop(setting.bundle, "keywords"))
        with sotto(setting.bundle) as server:
            result, cost = _costed_load(server, one)
            ours.append(result)
            costs.append(cost)
            by_wrk += _wrk(server, one, setting.folder)
        with empty() as server:
            floor.append(_costed_load(server, one)[1][0])
    rate, ceiling = median(result.requests_per_s for result in ours), median(bare)
    failures = sum(result.failures for result in ours)
    lines = [
        "## overhead",
        "",
        f"One-second clips as raw WAV bodies, {CLIENTS} clients, everything on the same {CPUS} cores, median of "
        f"{ROUNDS} "
        f"interleaved rounds: {rate:.0f} requests/s ({failures} failures), {rate / ceiling:.2f} of the {ceiling:.0f} "
        f"graph calls/s of a bare loop with one caller a core on the same part of the graph. Bar: 0.6.",
    ]
    loop, workers, generator = (median(values) for values in zip(*costs, strict=True))
    lines.append(
        f"Milliseconds of a core for each request: {CPUS * 1e3 / ceiling:.2f} in the bare loop; here the event loop "
        f"takes {loop:.2f}, all other threads {workers:.2f} (the graph call among them), the load generator "
        f"{generator:.2f}."
    )
    together = loop + workers + generator
    lines.append(
        f"So with no core ever idle {CPUS * 1e3 / together:.0f} requests/s would be what there is, "
        f"{CPUS * 1e3 / together / ceiling:.2f} of the bare loop's; {1 - together * rate / 1e3 / CPUS:.0%} of the "
        f"cores' time they idle, as {CLIENTS} clients that each wait for an answer wait for the same batches. Of the "
        f"event loop's {loop:.2f} ms the server takes {median(floor):.2f} by itself: that is uvicorn around an "
        "application that reads the body and answers a constant."
    )
    if by_wrk:
        lines.append(f"wrk, with as many connections: {median(by_wrk):.0f} requests/s.")
    return lines


def peers(setting: Setting) -> list[str]:
    """Throughput, and latency at the same offered load, beside what people would use instead."""
    one = clip(setting.folder, 1.0, "one")
    names = [name for name in PEERS if installed(name)]
    closed: dict[str, list[Result]] = {}
    offered: dict[str, dict[int, Result]] = {}

    def serve(name: str) -> AbstractContextManager[Server]:
        return sotto(setting.bundle) if name == "sotto" else peer(name, setting.bundle)

    for _ in range(ROUNDS):
        for name in ("sotto", *names):
            with serve(name) as server:
                closed.setdefault(name, []).append(load(server, [one], clients=CLIENTS, measure_s=6))
    best = {name: median(result.requests_per_s for result in results) for name, results in closed.items()}
    for name in ("sotto", *names):
        with serve(name) as server:
            for rate in OFFERED:
                # Beyond what it can do there is nothing to compare.
                if rate < best[name]:
                    offered.setdefault(name, {})[rate] = load(server, [one], rate=rate, measure_s=6)
    lines = [
        "## peers",
        "",
        "The same part of the graph, the same clips, the same client. LitServe takes JSON with base64, the others raw "
        f"bodies. Requests/s: {CLIENTS} clients in a closed loop, median of {ROUNDS} interleaved rounds. Then p99 in "
        "ms at "
        "the same offered load (Poisson arrivals, latency from when a request was due).",
        "",
        "| server | requests/s | p50 ms | p99 ms | failures | "
        + " | ".join(f"p99 at {rate}/s" for rate in OFFERED)
        + " |",
        "| --- |" + " ---: |" * (4 + len(OFFERED)),
    ]
    for name, results in closed.items():
        kinds = [next(iter(result.kinds.values())) for result in results if result.kinds]
        p99s = [
            f"{next(iter(offered[name][rate].kinds.values())).p99_ms:.1f}"
            if rate in offered.get(name, {}) and offered[name][rate].kinds
            else "-"
            for rate in OFFERED
        ]
        lines.append(
            f"| {name} | {best[name]:.0f} | {median(kind.p50_ms for kind in kinds):.1f} | "
            f"{median(kind.p99_ms for kind in kinds):.1f} | {sum(result.failures for result in results)} | "
            + " | ".join(p99s)
            + " |"
        )
    missing = [name for name in PEERS if name not in names]
    if missing:
        lines += ["", f"Not installed (`make bench-peers`), so not measured: {', '.join(missing)}."]
    rivals = {name: rate for name, rate in best.items() if name != "sotto"}
    rival = max(rivals, key=rivals.__getitem__)
    lines += [
        "",
        f"sotto against the best of them ({rival}): {best['sotto'] / rivals[rival]:.2f} times the requests/s.",
    ]
    _plot_latency(offered, setting.plots / "latency.png")
    return [*lines, "", "![p99 against offered load](latency.png)"]


def idle(setting: Setting) -> list[str]:
    """One request at a time."""
    one = clip(setting.folder, 1.0, "one")
    with sotto(setting.bundle) as server:
        found = load(server, [one], clients=1).kinds["one"]
    inference = found.server_p50_ms["inference"]
    stages = ", ".join(f"{name} {value:.2f}" for name, value in found.server_p50_ms.items())
    return [
        "## idle",
        "",
        f"One client, one request at a time: p50 {found.p50_ms:.2f} ms and p99 {found.p99_ms:.2f} ms at the client, "
        "of which "
        f"{found.p50_ms - inference:.2f} ms outside the graph call (bar: 2). Stages, ms: {stages}.",
    ]


def profile(setting: Setting) -> list[str]:
    """Where the event loop's time goes."""
    one, path = clip(setting.folder, 1.0, "one"), setting.folder / "profile"
    with sotto(setting.bundle, profile=path) as server:
        rate = load(server, [one], clients=CLIENTS).requests_per_s
        os.kill(server.pid, signal.SIGINT)
        while not path.is_file() or not path.stat().st_size:
            time.sleep(0.1)
        time.sleep(1.0)
    shares = _by_package(pstats.Stats(str(path)))
    total = sum(shares.values())
    rows = [f"| {name} | {seconds / total:.0%} |" for name, seconds in sorted(shares.items(), key=lambda one: -one[1])]
    return [
        "## profile",
        "",
        f"The main thread under cProfile, which slows it ({rate:.0f} requests/s), by whose code ran, without what "
        "that called. The loop itself (uvloop) is left out, since cProfile cannot tell it from waiting.",
        "",
        "| code | share |",
        "| --- | ---: |",
        *rows[:PROFILE_ROWS],
    ]


def mixed(setting: Setting) -> list[str]:
    """Short clips beside long ones."""
    short, long = clip(setting.folder, 1.0, "short"), clip(setting.folder, 8.0, "long")
    with sotto(setting.bundle) as server:
        capacity = load(server, [short], clients=CLIENTS, measure_s=5).requests_per_s
        # Seven short ones and one of eight seconds are fifteen seconds of audio: four tenths of what there is.
        shorts = 0.4 * capacity * 7 / 15
        alone, beside = [], []
        for _ in range(ROUNDS):
            alone.append(load(server, [short], rate=shorts).kinds["short"].p99_ms)
            beside.append(load(server, [short] * 7 + [long], rate=shorts * 8 / 7).kinds["short"].p99_ms)
    return [
        "## mixed",
        "",
        f"One-second clips at {shorts:.0f}/s: p99 {median(alone):.1f} ms; with an eight-second clip after every seven "
        "of "
        f"them {median(beside):.1f} ms, {median(beside) / median(alone):.2f} times (bar: 1.5). Medians of {ROUNDS} "
        "rounds.",
    ]


def streams(setting: Setting) -> list[str]:
    """Microphones at once, in real time."""
    return _streams(setting, "streams", PIECE_S, STREAMS)


def small(setting: Setting) -> list[str]:
    """Microphones as most are: they send fifty messages a second."""
    return _streams(setting, "streams of small messages", 0.02, SMALL_STREAMS)


def _streams(setting: Setting, title: str, piece_s: float, counts: Sequence[int]) -> list[str]:
    speech = setting.folder / "speech.wav"
    shutil.copy(Path(__file__).parents[1] / "examples" / "five-words.wav", speech)
    rows = []
    for count in counts:
        with sotto(setting.bundle, max_streams=str(max(counts))) as server:
            command = [sys.executable, "-m", "benchmarks.streams", str(server.port), str(speech)]
            command += ["--streams", str(count), "--piece-s", str(piece_s)]
            before, child = server.cpu_s, _children_s()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            after, spoken_s = server.cpu_s, count * (STREAMS_WARM_UP_S * 0.75 + STREAMS_MEASURE_S)
            used_s = (after[0] - before[0], after[1] - before[1], _children_s() - child)
        rows.append(json.loads(done.stdout) | {"costs_ms": [1e3 * seconds / spoken_s for seconds in used_s]})
        if rows[-1]["p99_ms"] > 2 * STREAM_DELAY_MS:
            break
    good = max((row["streams"] for row in rows if row["p99_ms"] < STREAM_DELAY_MS and not row["lost"]), default=0)
    lines = [
        f"## {title}",
        "",
        f"Real-time WebSocket streams of {1e3 * piece_s:.0f} ms messages; the delay is from a message to when all that "
        f"it completed has been told. {good / CPUS:.0f} streams a core ({good} on {CPUS} cores, which the client "
        f"shares) stay under {STREAM_DELAY_MS:.0f} ms at p99 (bar: 200 a core). The last columns are milliseconds of a "
        "core for a second of one stream: the event loop, all other threads (the graph calls among them), the client.",
        "",
        "| streams | delay p50 ms | p99 ms | lost | detections | loop | threads | client |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return lines + [
        f"| {row['streams']} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['lost']} | {row['detections']} | "
        + " | ".join(f"{cost:.2f}" for cost in row["costs_ms"])
        + " |"
        for row in rows
    ]


def start(setting: Setting) -> list[str]:
    """From the process's start to ready."""
    times, resident = [], []
    for _ in range(5):
        begin = time.perf_counter()
        with sotto(setting.bundle) as server:
            times.append(time.perf_counter() - begin)
            resident.append(server.resident_bytes / 1e6)
    return [
        "## start",
        "",
        f"Ready {median(times):.2f} s after the process began (median of 5, worst {max(times):.2f}; bar: 3), with "
        f"{median(resident):.0f} MB resident.",
    ]


def _bare_loop(bundle: Bundle, part: Part) -> float:
    """Graph calls per second with one caller a core, one session, no HTTP and no decoding."""
    session = open_clips(part_of(bundle.read(bundle.manifest.graph.file), PARTS[part]), threads=1)
    feeds = {"waveform": np.full((1, RATE_HZ), 0.01, np.float32), "lengths": np.array([RATE_HZ], np.int64)}
    session.run(None, feeds)
    return calls_per_s(session, feeds, CPUS, BARE_LOOP_S)


def _costed_load(server: Server, file: Path) -> tuple[Result, tuple[float, float, float]]:
    """With milliseconds of a core per request: the server's main thread, its others, the load generator."""
    before, child = server.cpu_s, _children_s()
    result = load(server, [file], clients=CLIENTS, warm_up_s=WARM_UP_S, measure_s=MEASURE_S)
    after = server.cpu_s
    used_s = (after[0] - before[0], after[1] - before[1], _children_s() - child)
    # Of the warm-up as well, in which nothing is counted.
    requests = result.requests_per_s * (WARM_UP_S + MEASURE_S)
    loop, others, generator = (1e3 * seconds / requests for seconds in used_s)
    return result, (loop, others, generator)


def _children_s() -> float:
    """Of processes that have ended, as the load generator has and the server has not."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _by_package(stats: pstats.Stats) -> dict[str, float]:
    """Own seconds of each package's functions."""
    found: dict[str, float] = defaultdict(float)
    # typeshed keeps this to itself: (file, line, function) -> (calls, recursive ones, own seconds, all seconds, more)
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = stats.stats  # type: ignore[attr-defined]
    for (file, _, function), (_, _, own_s, _, _) in entries.items():
        parts = Path(file).parts
        if file == "~":
            # Written in C. The loop's own run is mostly waiting.
            if "run_until_complete" in function:
                continue
            name = "functions in C"
        elif "site-packages" in parts:
            name = parts[parts.index("site-packages") + 1]
        elif "service" in parts:
            name = f"service/{parts[-1]}"
        else:
            name = "standard library"
        found[name] += own_s
    return found


def _wrk(server: Server, file: Path, folder: Path) -> list[float]:
    """Requests a second as wrk counts them; nothing where it is not installed."""
    if shutil.which("wrk") is None:
        return []
    script = folder / "post.lua"
    script.write_text(
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "audio/wav"\n'
        f'local f = io.open("{file}", "rb")\nwrk.body = f:read("*all")\nf:close()\n'
    )
    url = f"http://127.0.0.1:{server.port}{server.detect}"
    command = ["wrk", "-t1", f"-c{CLIENTS}", "-d8s", "-s", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if "Non-2xx" in done.stdout:
        raise RuntimeError(f"wrk saw refusals:\n{done.stdout}")
    found = re.search(r"Requests/sec:\s*([0-9.]+)", done.stdout)
    return [] if found is None else [float(found.group(1))]


def _plot_latency(offered: dict[str, dict[int, Result]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, by_rate in offered.items():
        points = [(rate, next(iter(found.kinds.values())).p99_ms) for rate, found in by_rate.items() if found.kinds]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="offered, requests/s", ylabel="p99, ms", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
