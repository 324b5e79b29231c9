"""Where one second of audio goes in the graph: ONNX Runtime's own profiler, operator by operator."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import onnxruntime

from model_store.inference import session_options
from model_store.whole import without_masks
from training.evaluation.cost import latencies_ms, one_second

RUNS = 300
# Kinds of operators that take less than this share of every graph are counted together.
LEAST_SHARE = 0.03
OTHERS = "others"


def operators_ms(graph: bytes, *, runs: int = RUNS) -> tuple[dict[str, float], Counter[str]]:
    """Milliseconds by kind of operator, each node at its median, and how many nodes of each kind there are once the
    graph is loaded. One thread. The profiler's own clock adds a few microseconds to each node."""
    with TemporaryDirectory() as folder:
        options = session_options(graph, 1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "calls")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, one_second())
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    spent: dict[str, float] = defaultdict(float)
    for (kind, _), durations in taken.items():
        spent[kind] += median(durations)
    return dict(spent), Counter(kind for kind, _ in taken)


def profile_table(graphs: Mapping[str, bytes]) -> list[str]:
    """Markdown: kinds of operators against graphs, and what a call takes without the profiler, side by side."""
    # As the service runs a clip that is alone.
    found = {name: operators_ms(without_masks(graph) or graph) for name, graph in graphs.items()}
    large = {
        kind
        for spent, _ in found.values()
        for kind, duration in spent.items()
        if duration >= LEAST_SHARE * sum(spent.values())
    }
    kinds = sorted(large, key=lambda kind: -max(spent.get(kind, 0.0) for spent, _ in found.values()))
    lines = ["| operator | " + " | ".join(graphs) + " |", "| --- |" + " ---: |" * len(graphs)]
    for kind in kinds:
        cells = [f"{spent[kind]:.2f} ms, {nodes[kind]}" if kind in spent else "-" for spent, nodes in found.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    rest = [
        f"{sum(spent.values()) - sum(spent.get(kind, 0.0) for kind in large):.2f} ms, "
        f"{sum(nodes.values()) - sum(nodes[kind] for kind in large)}"
        for spent, nodes in found.values()
    ]
    lines.append(f"| {OTHERS} | " + " | ".join(rest) + " |")
    whole = latencies_ms(graphs)
    lines.append("| a call, unprofiled | " + " | ".join(f"{whole[name].one_thread:.2f} ms" for name in graphs) + " |")
    return lines
