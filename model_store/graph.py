"""Checks on an ONNX graph before a byte of it reaches ONNX Runtime, and the contract it must keep.

inputs   waveform [batch, samples] float32 in [-1, 1], lengths [batch] int64
outputs  keyword_logits [batch, frames, labels], speaker_embedding [batch, dim],
         embedding [batch, dim], frames [batch, frames, dim], all float32
A bundle whose manifest has no `speaker` gives no speaker_embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx.utils
from google.protobuf.message import DecodeError

from model_store.errors import BundleError
from model_store.manifest import Manifest

# Name -> element type and rank.
Values = dict[str, tuple[int, int]]
INPUTS: Values = {"waveform": (onnx.TensorProto.FLOAT, 2), "lengths": (onnx.TensorProto.INT64, 1)}
OUTPUTS: Values = {
    "keyword_logits": (onnx.TensorProto.FLOAT, 3),
    "speaker_embedding": (onnx.TensorProto.FLOAT, 2),
    "embedding": (onnx.TensorProto.FLOAT, 2),
    "frames": (onnx.TensorProto.FLOAT, 3),
}
SPEAKER = "speaker_embedding"
STREAM_INPUTS: Values = {
    "samples": (onnx.TensorProto.FLOAT, 2),
    "position": (onnx.TensorProto.INT64, 1),
    "length": (onnx.TensorProto.INT64, 1),
    "state": (onnx.TensorProto.FLOAT, 2),
}
STREAM_OUTPUTS: Values = {"keyword_logits": (onnx.TensorProto.FLOAT, 3), "new_state": (onnx.TensorProto.FLOAT, 2)}
OPERATOR_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
MOST_NODES = 20_000
# ONNX Runtime takes a file with this mark at byte 4 for its own format, in which nothing here has been checked.
RUNTIME_FORMAT_MARK = b"ORTM"


def check_graph(data: bytes, manifest: Manifest) -> None:
    """Raises BundleError where the graph reaches outside itself, breaks the contract or is no ONNX."""
    outputs = {own: OUTPUTS[own] for own in outputs_of(manifest)}
    _check(manifest.graph.file, data, manifest.graph.opset, INPUTS, outputs)


def check_stream_graph(data: bytes, name: str, opset: int) -> None:
    """The same for a streaming graph (model_store/streaming.py)."""
    _check(name, data, opset, STREAM_INPUTS, STREAM_OUTPUTS)


def _check(name: str, data: bytes, opset: int, inputs: Values, outputs: Values) -> None:
    if data[4:8] == RUNTIME_FORMAT_MARK:
        raise BundleError(f"{name} is marked as what ONNX Runtime would read as its own format, not as ONNX")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise BundleError(f"{name} is not an ONNX model: {error}") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0:
            raise BundleError(f"{name}: tensor {tensor.name!r} keeps its data in another file")
    _check_operators(name, model, opset)
    _check_values(name, "input", model.graph.input, inputs)
    _check_values(name, "output", model.graph.output, outputs)


def outputs_of(manifest: Manifest) -> tuple[str, ...]:
    """What the bundle's graph gives, in the contract's order."""
    return tuple(name for name in OUTPUTS if name != SPEAKER or manifest.speaker is not None)


def part_of(graph: bytes, outputs: Sequence[str]) -> bytes:
    """What of a checked graph these outputs need, with the same inputs. ONNX Runtime runs every node of what it
    is given, whichever outputs are asked for."""
    extractor = onnx.utils.Extractor(onnx.ModelProto.FromString(graph))
    return bytes(extractor.extract_model(list(INPUTS), list(outputs)).SerializeToString())


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


def _check_values(name: str, kind: str, values: object, wanted: Values) -> None:
    found: Values = {}
    for value in values:  # type: ignore[attr-defined]  # protobuf's containers carry no types
        tensor = value.type.tensor_type
        found[value.name] = (tensor.elem_type, len(tensor.shape.dim))
    if found != wanted:
        raise BundleError(f"{name}: {kind}s (name: element type, rank) are {found}, the contract says {wanted}")


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside an attribute of a node (If, Loop, Scan), in it or in a function."""
    waiting = [model.graph, *_branches(_function_attributes(model))]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(_branches(attribute for node in graph.node for attribute in node.attribute))


def _branches(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    for attribute in attributes:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _function_attributes(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Those of the nodes directly in functions, and the defaults of the functions' own."""
    for function in model.functions:
        yield from function.attribute_proto
        for node in function.node:
            yield from node.attribute


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
        for node in graph.node:
            yield from _attribute_tensors(node.attribute)
    yield from _attribute_tensors(_function_attributes(model))


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        sparse_tensors = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for sparse in (*sparse_tensors, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
