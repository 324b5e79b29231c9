"""What a network costs: parameters, bytes, multiplications, milliseconds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto

from model_store import Bundle
from model_store.graph import part_of
from model_store.inference import open_session
from model_store.streaming import Chunk, StreamingGraph
from model_store.whole import open_clips
from training.audio_cache import SAMPLE_RATE_HZ

WARM_UP_RUNS, TIMED_RUNS = 30, 300
# Of a stream, as often as the service looks.
CHUNKS_A_SECOND = 4
KEYWORDS = "keyword_logits"


@dataclass(frozen=True, slots=True)
class Latency:
    """Median milliseconds for one second of audio in ONNX Runtime."""

    one_thread: float
    all_threads: float
    threads: int


def machine() -> str:
    """What times are taken on, in words."""
    cpu = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, ONNX Runtime {onnxruntime.__version__}"


def one_second() -> dict[str, Any]:
    """Noise, as the served graph takes it; what it costs does not depend on what is heard."""
    noise = np.random.default_rng(0).standard_normal((1, SAMPLE_RATE_HZ)).astype(np.float32) * np.float32(0.05)
    return {"waveform": noise, "lengths": np.array([SAMPLE_RATE_HZ], dtype=np.int64)}


def latencies_ms(graphs: Mapping[str, bytes], *, runs: int = TIMED_RUNS) -> dict[str, Latency]:
    """As the service runs a clip that is alone, without masks. Side by side in one run: the graphs take turns, so what
    slows the machine slows them all."""
    threads = len(os.sched_getaffinity(0))
    feeds = one_second()
    medians: dict[int, dict[str, float]] = {}
    for count in (1, threads):
        sessions = {name: open_clips(graph, threads=count) for name, graph in graphs.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for run in range(WARM_UP_RUNS + runs):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds)
                if run >= WARM_UP_RUNS:
                    times[name].append(time.perf_counter() - start)
        medians[count] = {name: float(np.median(taken) * 1e3) for name, taken in times.items()}
    return {name: Latency(medians[1][name], medians[threads][name], threads) for name in graphs}


def streaming_ms(bundle: Bundle, streams: int, *, runs: int = TIMED_RUNS) -> tuple[float, float]:
    """Median milliseconds of one thread for a second of a stream, in chunks as the service gives them, `streams` in a
    call, and for the keywords of a clip of a second; taking turns. The bundle has to have a streaming graph."""
    manifest = bundle.manifest
    assert manifest.stream is not None
    hop = round(manifest.keywords.frame_hop_s * SAMPLE_RATE_HZ)
    stream = StreamingGraph(open_session(bundle.read(manifest.stream.file), threads=1), manifest.stream, hop=hop)
    clip = open_clips(part_of(bundle.read(manifest.graph.file), (KEYWORDS,)), threads=1)
    feeds = one_second()
    chunks = feeds["waveform"][0].reshape(CHUNKS_A_SECOND, -1)
    progress = [stream.begin()] * streams
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(WARM_UP_RUNS + runs):
        start = time.perf_counter()
        for samples in chunks:
            progress = [after for _, after in stream.run([Chunk(before, samples) for before in progress])]
        between = time.perf_counter()
        clip.run([KEYWORDS], feeds)
        if run >= WARM_UP_RUNS:
            times[0].append((between - start) / streams)
            times[1].append(time.perf_counter() - between)
    return float(np.median(times[0]) * 1e3), float(np.median(times[1]) * 1e3)


def multiply_accumulates(graph: bytes) -> int:
    """Of the convolutions and matrix products, for one second of audio.

    Counted from the shapes that really occur: every such node's output is made an output of the graph,
    which is then run once, not optimised.
    """
    model = onnx.load_from_string(graph)
    counted = [node for node in model.graph.node if node.op_type in {"Conv", "MatMul", "Gemm"}]
    wanted = sorted({name for node in counted for name in (*node.input[:2], node.output[0])})
    given = {item.name for item in (*model.graph.input, *model.graph.initializer)}
    declared = {item.name for item in model.graph.output}
    for name in wanted:
        if name not in given and name not in declared:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # it would say of constants that fused nodes left that nobody uses them
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = one_second()
    shapes = {
        name: np.shape(value) for name, value in zip(names, session.run(names, feeds), strict=True) if value is not None
    }
    shapes |= {name: np.shape(value) for name, value in feeds.items()}
    weights = {item.name: tuple(item.dims) for item in model.graph.initializer}
    return sum(_products(node, shapes | weights) for node in counted)


def _products(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    made = int(np.prod(shapes[node.output[0]]))
    if node.op_type == "Conv":
        # [out, in / groups, *kernel]: each output value sums over all but the first.
        return made * int(np.prod(shapes[node.input[1]][1:]))
    inner = shapes[node.input[0]][0 if _transposed(node) else -1]
    return made * int(inner)


def _transposed(node: NodeProto) -> bool:
    return any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
