"""Rewrites an exported graph so that ONNX Runtime computes it faster, with the same outputs up to the last bits.

`in_two_dimensions`: it has fast kernels for convolutions over height and width only; those over time alone, of
which transformers' models are full, are slower, the grouped one of 128 taps most of all. So they get a height of one.
Where it pads, a kernel computes output by output. With 64 zeros on either side that is all of a second, so the zeros of
long kernels are put there before, by a Concat: a Pad would be made part of the convolution again.

`keep_blocked`: it keeps its blocked layout from end to end.

ONNX Runtime computes convolutions on channels in blocks (NCHWc) and converts back wherever another
operator does not know that layout. Two things made it convert in every layer of ours:

- `x * mask` with a mask of one channel. As a product of two equal shapes it stays in the blocked layout,
  so each mask is spread over the channels, once per width, by a convolution with ones.
- sums whose operands' shapes are not known to be equal. Named dimensions prove that they are.
- padding by an operator of its own, where it is not the same on both sides. A convolution can do that as well.

A call on one second of audio takes about a tenth less time by it.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from model_store.inference import open_session

# Sizes that no layer has, so that each dimension of a probed shape tells what it stands for.
PROBE_CLIPS = 3
PROBE_FRAMES = 109

# The axis of height, as a tensor of the graph.
HEIGHT = "height_axis"
# How the kernels that spread a mask are named.
ONES = "_ones"
# Taps from which on a convolution's zeros are put around its input.
LONG_KERNEL = 32

Shapes = dict[str, tuple[int, ...]]


def keep_blocked(graph: bytes, *, hop: int, strides: dict[str, int]) -> bytes:
    """The same graph with spread masks and named dimensions.

    `hop` is the samples in a feature frame; `strides` names each frame rate and says how many feature
    frames one of its frames covers.
    """
    model = onnx.load_from_string(graph)
    _fuse_pads(model)
    shapes = _probe(model, hop)
    _spread_masks(model.graph, shapes)
    names = {-(-PROBE_FRAMES // stride): name for name, stride in strides.items()}
    del model.graph.value_info[:]
    for name, shape in shapes.items():
        dims: list[str | int | None] = ["batch", shape[1], shape[2], names.get(shape[3], shape[3])]
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
    return bytes(model.SerializeToString())


def in_two_dimensions(graph: bytes) -> bytes:
    """The same graph with every convolution over time as one over a height of one and time."""
    model = onnx.load_from_string(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        kernel = weights.get(node.input[1]) if node.op_type == "Conv" else None
        nodes += [node] if kernel is None or len(kernel.dims) != 3 else _with_height(node, kernel)
    if len(nodes) == len(model.graph.node):
        return graph
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), HEIGHT))
    # Two layers may share a kernel, so each is given its height once, and only here.
    for name in {node.input[1] for node in nodes if node.op_type == "Conv"}:
        if name in weights and len(weights[name].dims) == 3:
            weights[name].dims.insert(2, 1)
    return bytes(model.SerializeToString())


def _with_height(node: onnx.NodeProto, kernel: onnx.TensorProto) -> list[onnx.NodeProto]:
    """The convolution between two changes of shape."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    first, last = given.get("pads", [0, 0])
    (output,) = node.output
    high, padded, convolved = f"{output}_high", f"{output}_padded", f"{output}_convolved"
    around: list[onnx.NodeProto] = []
    if kernel.dims[2] >= LONG_KERNEL and first == last > 0:
        around = _zeros_around(high, padded, kernel.dims[1] * given.get("group", 1), first)
        first = last = 0
    attributes = {
        **given,
        "kernel_shape": [1, kernel.dims[2]],
        "strides": [1, *given.get("strides", [1])],
        "dilations": [1, *given.get("dilations", [1])],
        "pads": [0, first, 0, last],
    }
    return [
        helper.make_node("Unsqueeze", [node.input[0], HEIGHT], [high]),
        *around,
        helper.make_node(
            "Conv", [padded if around else high, *node.input[1:]], [convolved], name=node.name, **attributes
        ),
        helper.make_node("Squeeze", [convolved, HEIGHT], [output]),
    ]


def _zeros_around(name: str, padded: str, channels: int, count: int) -> list[onnx.NodeProto]:
    """`count` zeros on either side of [B, channels, 1, T]."""
    batch, rest, shape, zeros = (f"{padded}_{part}" for part in ("batch", "rest", "shape", "zeros"))
    sizes = numpy_helper.from_array(np.array([channels, 1, count]))
    return [
        helper.make_node("Shape", [name], [batch], start=0, end=1),
        helper.make_node("Constant", [], [rest], value=sizes),
        helper.make_node("Concat", [batch, rest], [shape], axis=0),
        helper.make_node("ConstantOfShape", [shape], [zeros]),
        helper.make_node("Concat", [zeros, name, zeros], [padded], axis=3),
    ]


def _probe(model: onnx.ModelProto, hop: int) -> Shapes:
    """Shapes of all four-dimensional float tensors on a batch of a known size."""
    outputs = {output.name for output in model.graph.output}
    values = _values(model, [name for node in model.graph.node for name in node.output if name not in outputs], hop)
    return {
        name: value.shape
        for name, value in values.items()
        if getattr(value, "ndim", 0) == 4 and value.dtype == np.float32
    }


def _values(model: onnx.ModelProto, names: list[str], hop: int = 1) -> dict[str, npt.NDArray[np.generic]]:
    """Tensors inside the graph, on a batch of a known size."""
    if not names:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = open_session(probe.SerializeToString(), threads=1)
    samples = PROBE_FRAMES * hop
    given: dict[str, npt.NDArray[np.generic]] = {
        "waveform": np.zeros((PROBE_CLIPS, samples), np.float32),
        "lengths": np.full(PROBE_CLIPS, samples, np.int64),
    }
    return dict(zip(names, session.run(names, given), strict=True))


def _fuse_pads(model: onnx.ModelProto) -> None:
    """Replace `Conv(Pad(x))` by a Conv that pads with as many zeros itself."""
    graph = model.graph
    uses = Counter(name for node in graph.node for name in node.input)
    pads = {node.output[0]: node for node in graph.node if node.op_type == "Pad" and uses[node.output[0]] == 1}
    padded = [node for node in graph.node if node.op_type == "Conv" and node.input[0] in pads]
    # The exporter computes the sizes, from constants.
    sizes = _values(model, [pads[node.input[0]].input[1] for node in padded])
    for node in padded:
        pad = pads[node.input[0]]
        # Of batch, channels, height and width, first before and then after.
        size = sizes[pad.input[1]].tolist()
        if any(size[index] for index in (0, 1, 4, 5)) or [one.s for one in pad.attribute] not in ([], [b"constant"]):
            continue
        own = next(attribute for attribute in node.attribute if attribute.name == "pads")
        total = [first + second for first, second in zip(own.ints, (*size[2:4], *size[6:8]), strict=True)]
        own.CopyFrom(helper.make_attribute("pads", total))
        node.input[0] = pad.input[0]
        graph.node.remove(pad)


def _spread_masks(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """Replace `Mul(x, mask)` by `Mul(x, Conv(mask, ones))`; adds the new tensors' shapes to `shapes`."""
    cast_from = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    spread: dict[tuple[str, int], str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "Mul" and all(name in shapes for name in node.input):
            values, mask = node.input
            channels = shapes[values][1]
            if shapes[mask][1:3] == (1, 1) and channels > 1 and shapes[values][2] == 1:
                # Each layer casts the mask for itself, some of them twice.
                while cast_from.get(mask) in shapes:
                    mask = cast_from[mask]
                key = (mask, channels)
                if key not in spread:
                    spread[key] = f"{key[0]}_x{channels}"
                    ones = f"{spread[key]}{ONES}"
                    graph.initializer.append(
                        numpy_helper.from_array(np.ones((channels, 1, 1, 1), dtype=np.float32), ones)
                    )
                    nodes.append(helper.make_node("Conv", [mask, ones], [spread[key]], kernel_shape=[1, 1]))
                    shapes[spread[key]] = shapes[values]
                node.input[1] = spread[key]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def narrow_masks(graph: onnx.GraphProto) -> None:
    """Undo `_spread_masks`, for layers that are not computed in blocks; what no node uses goes as well."""
    spread = {node.output[0]: node for node in graph.node if node.op_type == "Conv" and node.input[1].endswith(ONES)}
    for node in spread.values():
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [spread[name].input[0] if name in spread else name for name in node.input]
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in used]:
        graph.node.remove(node)
    del graph.value_info[:]
