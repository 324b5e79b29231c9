"""Weights in eight bits in the file, in float when it runs: a quarter of the size, and nothing else changes.

Every kernel and matrix is kept as int8 with one scale for each output channel (symmetric, rounded to nearest) behind a
DequantizeLinear. `open_session` has ONNX Runtime undo that once, as it loads, so a call costs what it did and no scale
depends on what a clip was batched with, as those of dynamic quantisation do. What the rounding does to detections and
scores is for the recognition rows to say (`sotto evaluate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from model_store import Bundle, Manifest, golden
from model_store.files import describe
from model_store.graph import outputs_of
from model_store.inference import open_session
from model_store.store import open_bundle
from training.export import run_graph, write_draft

# Of smaller tensors the scales and nodes would weigh as much as what is saved.
LEAST_VALUES = 1024
HIGHEST = 127
# Weights of two graphs that differ by no more, or by no larger a part, are the same: norms are folded into them at
# different precision, and those of a channel that was hardly ever heard are huge then.
SAME = 1e-5

Floats = npt.NDArray[np.float32]


def compact(draft: Path) -> Manifest:
    """Rewrite the graph of the draft, and the outputs that its golden clip is to give. Raises StoreError."""
    bundle = open_bundle(draft)
    before = bundle.manifest
    graph, rounded = in_eight_bits(bundle.read(before.graph.file))
    stream = None
    if before.stream is not None:
        stream, _ = in_eight_bits(bundle.read(before.stream.file), rounded)
    return rewrite(draft, bundle, graph, stream, weights="int8")


def rewrite(draft: Path, bundle: Bundle, graph: bytes, stream: bytes | None, **described: str) -> Manifest:
    """The draft with other graphs for the same clips, what its golden clip gives with them, and no figures yet.
    `described` is what changes of the manifest's `graph`."""
    before = bundle.manifest
    names = outputs_of(before)
    clip, _ = golden.unpack(bundle.read(before.golden_file), names)
    outputs = run_graph(open_session(graph, threads=1), [clip], names)
    files = {
        before.graph.file: graph,
        before.golden_file: golden.pack(clip, {name: values[0] for name, values in outputs.items()}),
    }
    if before.stream is not None and stream is not None:
        files[before.stream.file] = stream
    manifest = before.model_copy(
        update={
            "graph": before.graph.model_copy(update=described),
            "files": {**before.files, **{name: describe(data) for name, data in files.items()}},
            # Measured on other weights.
            "metrics": (),
        }
    )
    write_draft(draft, manifest, files)
    return manifest


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight before and after: values = levels * scales along `axis`, nearly."""

    values: Floats
    levels: npt.NDArray[np.int8]
    scales: Floats
    axis: int


def in_eight_bits(graph: bytes, alike: Sequence[Rounded] | None = None) -> tuple[bytes, list[Rounded]]:
    """The same graph with its kernels and matrices in eight bits, and what was rounded. Small ones, and those that have
    been done before, stay as they are. With `alike`, only what is one of those is rounded, and just as it was: a
    streaming graph stays equal to the clip graph."""
    model = onnx.load_from_string(graph)
    axes = _output_axes(model.graph)
    uses = Counter(name for node in model.graph.node for name in node.input)
    kept, before, done = [], [], []
    for tensor in model.graph.initializer:
        axis = axes.get(tensor.name)
        whole = int(np.prod(tensor.dims)) >= LEAST_VALUES and tensor.data_type == onnx.TensorProto.FLOAT
        if axis is None or not whole or uses[tensor.name] != 1:
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        rounded = Rounded(values, *quantised(values, axis), axis) if alike is None else _found(values, axis, alike)
        if rounded is None:
            kept.append(tensor)
            continue
        done.append(rounded)
        names = [f"{tensor.name}_{part}" for part in ("levels", "scales")]
        kept += [numpy_helper.from_array(rounded.levels, names[0]), numpy_helper.from_array(rounded.scales, names[1])]
        before.append(helper.make_node("DequantizeLinear", names, [tensor.name], axis=axis))
    nodes = [*before, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString()), done


def _found(values: Floats, axis: int, alike: Sequence[Rounded]) -> Rounded | None:
    """The weight as one of `alike` was rounded: the same, or a convolution over time that is a product here."""
    for other in alike:
        if other.values.shape == values.shape and np.allclose(other.values, values, rtol=SAME, atol=SAME):
            return Rounded(values, other.levels, other.scales, other.axis)
        if other.values.size == values.size and other.values.ndim == 4 and values.ndim == 2:
            product = as_product(other.values)
            if product.shape == values.shape and np.allclose(product, values, rtol=SAME, atol=SAME):
                return Rounded(values, np.ascontiguousarray(as_product(other.levels)), other.scales, axis)
    return None


def as_product(kernel: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A kernel over time [C', C, 1, taps] as a matrix [taps * C, C'] (training/students/streaming.py)."""
    return kernel[:, :, 0].transpose(2, 1, 0).reshape(-1, len(kernel))


def quantised(values: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(levels of the same shape, a scale for each index of `axis`): values = levels * scale, within half a scale."""
    others = tuple(index for index in range(values.ndim) if index != axis)
    highest = np.abs(values).max(axis=others, keepdims=True)
    scales = np.where(highest > 0, highest / HIGHEST, 1).astype(np.float32)
    levels = np.rint(values / scales).clip(-HIGHEST, HIGHEST).astype(np.int8)
    return levels, scales.ravel()


def _output_axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Of each weight, the axis along which its output channels lie."""
    axes = {}
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if len(node.input) < 2 or node.input[1] not in ranks:
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv" or (node.op_type == "Gemm" and given.get("transB")):
            axes[node.input[1]] = 0
        elif node.op_type in ("MatMul", "Gemm"):
            axes[node.input[1]] = ranks[node.input[1]] - 1
    return axes
