"""Checks on an ONNX graph before a byte of it reaches ONNX Runtime, and the contract it must keep.

inputs   waveform [batch, samples] float32 in [-1, 1], lengths [batch] int64
outputs  keyword_logits [batch, frames, labels], speaker_embedding [batch, dim],
         embedding [batch, dim], frames [batch, frames, dim], all float32
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError

from model_store.errors import BundleError
from model_store.manifest import Manifest

INPUTS = {"waveform": (onnx.TensorProto.FLOAT, 2), "lengths": (onnx.TensorProto.INT64, 1)}
OUTPUTS = {
    "keyword_logits": (onnx.TensorProto.FLOAT, 3),
    "speaker_embedding": (onnx.TensorProto.FLOAT, 2),
    "embedding": (onnx.TensorProto.FLOAT, 2),
    "frames": (onnx.TensorProto.FLOAT, 3),
}
OPERATOR_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
MOST_NODES = 20_000


def check_graph(data: bytes, manifest: Manifest) -> None:
    """Raises BundleError where the graph reaches outside itself, breaks the contract or is no ONNX."""
    name = manifest.graph.file
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise BundleError(f"{name} is not an ONNX model: {error}") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0:
            raise BundleError(f"{name}: tensor {tensor.name!r} keeps its data in another file")
    _check_operators(name, model, manifest.graph.opset)
    _check_values(name, "input", model.graph.input, INPUTS)
    _check_values(name, "output", model.graph.output, OUTPUTS)


def _check_operators(name: str, model: onnx.ModelProto, opset: int) -> None:
    nodes = list(_nodes(model))
    if len(nodes) > MOST_NODES:
        raise BundleError(f"{name} has {len(nodes)} nodes, allowed are {MOST_NODES}")
    foreign = sorted({node.domain for node in nodes} - OPERATOR_DOMAINS)
    if foreign:
        raise BundleError(f"{name} uses operators of {', '.join(foreign)}")
    found = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    if found != {opset}:
        raise BundleError(f"{name} is opset {sorted(found)}, the manifest says {opset}")


def _check_values(name: str, kind: str, values: object, wanted: dict[str, tuple[int, int]]) -> None:
    found: dict[str, tuple[int, int]] = {}
    for value in values:  # type: ignore[attr-defined]  # protobuf's containers carry no types
        tensor = value.type.tensor_type
        found[value.name] = (tensor.elem_type, len(tensor.shape.dim))
    if found != wanted:
        raise BundleError(f"{name}: {kind}s (name: element type, rank) are {found}, the contract says {wanted}")


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside a node's attributes (If, Loop, Scan)."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting.extend([attribute.g] if attribute.HasField("g") else [])
                waiting.extend(attribute.graphs)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse_tensors = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for sparse in (*sparse_tensors, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
