"""ONNX graphs made node by node: one that keeps the contract, and the ways to break it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
HOP = 640
LABELS = 4
DIM = 8

# Ways to spoil the outputs. The first two make a clip depend on what it is batched with.
BATCH_MAXIMUM = "batch maximum"
PADDED_MEAN = "padded mean"
SHORT_VECTORS = "short vectors"
RANK = "rank"


def graph(*, seed: int = 3, spoil: str = "", outputs: Sequence[onnx.ValueInfoProto] | None = None) -> onnx.ModelProto:
    """Frames of 640 samples, projected; sums over time, made unit vectors."""
    rng = np.random.default_rng(seed)
    weights = {
        "to_logits": rng.standard_normal((LABELS, 1, HOP)) / HOP,
        "to_frames": rng.standard_normal((DIM, 1, HOP)) / HOP,
        "zero": np.zeros((), np.int64),
        "one": np.ones((), np.int64),
        "first": np.array([1], np.int64),
        "tiny": np.full((1, 1), 1e-3),
        "swapped": np.array([0, 2, 1], np.int64),
        "all": np.ones(3, bool),
    }
    nodes = [
        helper.make_node("Shape", ["waveform"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["samples"]),
        helper.make_node("Range", ["zero", "samples", "one"], ["positions"]),
        helper.make_node("Unsqueeze", ["lengths", "first"], ["ends"]),
        helper.make_node("Less", ["positions", "ends"], ["within"]),
        helper.make_node("Cast", ["within"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["waveform", "mask"], ["heard"]),
        *_scaled(spoil),
        helper.make_node("Unsqueeze", ["scaled", "first"], ["signal"]),
        helper.make_node("Conv", ["signal", "to_logits"], ["logits"], strides=[HOP]),
        helper.make_node("Transpose", ["logits"], ["keyword_logits"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["signal", "to_frames"], ["channels"], strides=[HOP]),
        helper.make_node("Transpose", ["channels"], ["frames"], perm=[0, 2, 1]),
        helper.make_node("Abs", ["frames"], ["loud"]),
        helper.make_node("ReduceSum", ["loud", "first"], ["total"], keepdims=0),
        *_vectors(spoil),
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        [value("waveform", TensorProto.FLOAT, "batch", "samples"), value("lengths", TensorProto.INT64, "batch")],
        list(outputs or contract_outputs()),
        [numpy_helper.from_array(_typed(array), name) for name, array in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def contract_outputs() -> list[onnx.ValueInfoProto]:
    return [
        value("keyword_logits", TensorProto.FLOAT, "batch", "frames", LABELS),
        value("speaker_embedding", TensorProto.FLOAT, "batch", DIM),
        value("embedding", TensorProto.FLOAT, "batch", DIM),
        value("frames", TensorProto.FLOAT, "batch", "frames", DIM),
    ]


def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


PLACES = (
    "initializer",
    "sparse initializer",
    "attribute",
    "attribute list",
    "sparse attribute",
    "subgraph node",
    "subgraph initializer",
    "function",
    "function subgraph",
    "function default",
)


def tensor_at(model: onnx.ModelProto, place: str, tensor: onnx.TensorProto) -> None:
    """Hide `tensor` at one of PLACES."""
    sparse = onnx.SparseTensorProto(values=tensor)
    constant = helper.make_node("Constant", [], ["hidden"], value=tensor)
    match place:
        case "initializer":
            model.graph.initializer.append(tensor)
        case "sparse initializer":
            model.graph.sparse_initializer.append(sparse)
        case "attribute":
            node_at(model, "graph", constant)
        case "attribute list":
            node_at(model, "graph", helper.make_node("Constant", [], ["hidden"], values=[tensor]))
        case "sparse attribute":
            node_at(model, "graph", helper.make_node("Constant", [], ["hidden"], sparse_value=sparse))
        case "subgraph initializer":
            model.graph.node.append(_choice(helper.make_graph([], "branch", [], [], [tensor])))
        case "subgraph node" | "function" | "function subgraph":
            node_at(model, place.removesuffix(" node"), constant)
        case "function default":
            function = _function([])
            function.attribute_proto.append(helper.make_attribute("table", tensor))
            model.functions.append(function)
        case other:
            raise ValueError(other)


def node_at(model: onnx.ModelProto, place: str, node: onnx.NodeProto) -> None:
    """Add a node to the graph, to a branch inside it, or the same inside a function."""
    if "subgraph" in place:
        node = _choice(helper.make_graph([node], "branch", [], []))
    if "function" in place:
        model.functions.append(_function([node]))
    else:
        model.graph.node.append(node)


def outside_tensor(location: str, *, flagged: bool = True) -> onnx.TensorProto:
    """A tensor whose data is in the file `location`."""
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[4])
    if flagged:
        tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


def _scaled(spoil: str) -> list[onnx.NodeProto]:
    """`heard` -> `scaled`: the same, or made to depend on the batch."""
    match spoil:
        case "batch maximum":
            return [
                helper.make_node("ReduceMax", ["heard"], ["peak"], keepdims=1),
                helper.make_node("Div", ["heard", "peak"], ["scaled"]),
            ]
        case "padded mean":
            return [
                helper.make_node("ReduceMean", ["heard"], ["mean"], axes=[1], keepdims=1),
                helper.make_node("Sub", ["heard", "mean"], ["scaled"]),
            ]
        case _:
            return [helper.make_node("Identity", ["heard"], ["scaled"])]


def _vectors(spoil: str) -> list[onnx.NodeProto]:
    """`total` -> `embedding` and `speaker_embedding`."""
    norm = helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1], keepdims=1)
    unit = helper.make_node("Div", ["embedding", "norm"], ["speaker_embedding"])
    match spoil:
        case "short vectors":
            return [
                helper.make_node("Add", ["total", "tiny"], ["embedding"]),
                helper.make_node("Mul", ["embedding", "tiny"], ["speaker_embedding"]),
            ]
        case "rank":
            # The shape to take is known only when the graph runs, so the wrong declaration loads.
            return [
                helper.make_node("Add", ["total", "tiny"], ["right"]),
                helper.make_node("ReduceL2", ["right"], ["norm"], axes=[1], keepdims=1),
                helper.make_node("Div", ["right", "norm"], ["speaker_embedding"]),
                helper.make_node("Shape", ["right"], ["two"]),
                helper.make_node("Concat", ["two", "first"], ["three"], axis=0),
                helper.make_node("Gather", ["three", "swapped"], ["longer"]),
                helper.make_node("Compress", ["longer", "all"], ["kept"]),
                helper.make_node("Reshape", ["right", "kept"], ["embedding"]),
            ]
        case _:
            return [helper.make_node("Add", ["total", "tiny"], ["embedding"]), norm, unit]


def _choice(branch: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)


def _function(nodes: Sequence[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function("com.microsoft", "Hidden", [], [], list(nodes), [helper.make_opsetid("", OPSET)])


def _typed(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array
