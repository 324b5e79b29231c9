"""Clips that fill their batch, as one alone always does: no sample of it is padding, so every mask is one everywhere.

A graph multiplies by its masks after every layer. That is a sixth of what a clip of a second takes, and in eight bits,
where each mask is applied in float, more nodes go to it than to convolutions. So a clip graph is opened twice: as it
is, and without the masks for calls in which every length is the batch's. Outputs are the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from model_store.golden import TOLERANCE
from model_store.inference import Provider, Session, open_session

# Of the clip on which both are compared, at the contract's 16 kHz: no multiple of any hop.
PROBE_SAMPLES = 8111
# What is one everywhere stays so through these, which move elements but make none.
MOVES = frozenset(("Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))

log = logging.getLogger(__name__)

Feeds = Mapping[str, npt.NDArray[np.generic]]


class Clips:
    """Sessions on a clip graph (model_store/graph.py), which take turns as one."""

    def __init__(self, masked: Session, whole: Session | None) -> None:
        """`whole` is for calls in which nothing is padding, where there is one."""
        self._masked = masked
        self._whole = whole

    @property
    def copies(self) -> int:
        """How often the weights are in memory."""
        return 1 if self._whole is None else 2

    def run(self, outputs: Sequence[str] | None, feeds: Feeds) -> list[npt.NDArray[np.float32]]:
        """As a session does."""
        if self._whole is not None and (feeds["lengths"] == feeds["waveform"].shape[-1]).all():
            return self._whole.run(outputs, feeds)
        return self._masked.run(outputs, feeds)


def open_clips(graph: bytes, *, threads: int, provider: Provider = "cpu") -> Clips:
    """Raises ONNX Runtime's own exceptions."""
    masked = open_session(graph, threads=threads, provider=provider)
    try:
        rest = without_masks(graph)
        whole = None if rest is None else open_session(rest, threads=threads, provider=provider)
    except Exception:
        # Whatever a graph that nobody thought of brings about here, with its masks it runs. ONNX Runtime's exceptions
        # share no base class.
        log.exception("masks cannot be left out of a graph")
        whole = None
    return Clips(masked, whole if whole is not None and _agree(masked, whole, graph) else None)


def without_masks(graph: bytes) -> bytes | None:
    """What is left of a checked clip graph where `lengths` are all the waveform's own. None where lengths serve for
    more than masks: as much would be computed as before, and the weights of such a graph (Whisper's) may be large.

    A mask is what comes of `Less(positions, lengths)`, where positions are some of those of all samples; products with
    one, and choices by one, go.
    """
    model = onnx.ModelProto.FromString(graph)
    if any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute):
        return None  # What a branch or a loop uses of the graph around it is not followed here.
    masks = _Masks(model.graph)
    kept = [node for node in model.graph.node if not masks.explains(node)]
    for node in kept:
        node.input[:] = [masks.source(name) for name in node.input]
    needed = {output.name for output in model.graph.output}
    kept += [helper.make_node("Identity", [masks.source(name)], [name]) for name in needed & masks.replaced]
    used = []
    for node in reversed(kept):
        if needed.intersection(node.output):
            needed.update(node.input)
            used.append(node)
    if needed & {"lengths", *masks.lost} or len(used) == len(model.graph.node):
        return None
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    described = [value for value in model.graph.value_info if value.name in needed]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(reversed(used))
    model.graph.initializer.extend(tensors)
    model.graph.value_info.extend(described)
    return bytes(model.SerializeToString())


class _Masks:
    """What of a graph is known where nothing is padding, node by node in their order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._of_lengths = {"lengths"}
        # Shapes of the waveform, its number of samples, and numbers from 0 to below that.
        self._shapes: set[str] = set()
        self._counts: set[str] = set()
        self._positions: set[str] = set()
        self._ones: set[str] = set()
        self._zeros: set[str] = set()
        self._sources: dict[str, str] = {}

    @property
    def lost(self) -> set[str]:
        """Masks, whose nodes are gone: a graph that needs one for something else keeps them all."""
        return self._ones | self._zeros

    @property
    def replaced(self) -> set[str]:
        """What is the same as another tensor."""
        return set(self._sources)

    def source(self, name: str) -> str:
        """What the tensor is the same as."""
        return self._sources.get(name, name)

    def explains(self, node: onnx.NodeProto) -> bool:
        """Whether the node's output is known, so that the node can go."""
        if node.op_type == "Constant":
            self._constants.update((node.output[0], one.t) for one in node.attribute if one.name == "value")
            return False
        if not node.input or len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
            return False
        inputs, (output,) = [self.source(name) for name in node.input], node.output
        if self._tells_where(node, inputs, output):
            return False
        if self._is_ones(node.op_type, inputs, node):
            self._ones.add(output)
        elif self._is_zeros(node.op_type, inputs):
            self._zeros.add(output)
        elif (same := self._same(node.op_type, inputs)) is not None:
            self._sources[output] = same
        else:
            return False
        return True

    def _tells_where(self, node: onnx.NodeProto, inputs: list[str], output: str) -> bool:
        """Note what masks are made of."""
        kind = node.op_type
        if kind == "Shape" and inputs == ["waveform"] and not node.attribute:
            self._shapes.add(output)
        elif kind == "Gather" and inputs[0] in self._shapes and self._value(inputs[1]) in (1, -1):
            self._counts.add(output)
        elif (
            kind == "Range" and inputs[1] in self._counts and (self._value(inputs[0]), self._value(inputs[2])) == (0, 1)
        ):
            self._positions.add(output)
        else:
            for known in (self._of_lengths, self._counts, self._positions):
                if kind in MOVES and inputs[0] in known:
                    known.add(output)
                    return True
            return False
        return True

    def _value(self, name: str) -> float | None:
        """Of a constant that is one number."""
        if name not in self._constants:
            return None
        values = numpy_helper.to_array(self._constants[name])
        return float(values.item()) if values.size == 1 else None

    def _is_ones(self, kind: str, inputs: list[str], node: onnx.NodeProto) -> bool:
        if kind == "Less":
            return inputs[0] in self._positions and inputs[1] in self._of_lengths
        if inputs[0] not in self._ones:
            return False
        if kind == "Conv" and len(inputs) == 2 and inputs[1] in self._constants:
            # One mask, spread over the channels (training/layout.py).
            kernel = numpy_helper.to_array(self._constants[inputs[1]])
            pads = [size for one in node.attribute if one.name == "pads" for size in one.ints]
            return math.prod(kernel.shape[1:]) == 1 and bool((kernel == 1).all()) and not any(pads)
        return kind in MOVES or (kind == "Mul" and inputs[1] in self._ones)

    def _is_zeros(self, kind: str, inputs: list[str]) -> bool:
        if kind == "Equal" and inputs[0] in self._ones and inputs[1] in self._constants:
            return not numpy_helper.to_array(self._constants[inputs[1]]).any()
        return (kind == "Not" and inputs[0] in self._ones) or (kind in MOVES and inputs[0] in self._zeros)

    def _same(self, kind: str, inputs: list[str]) -> str | None:
        if kind == "Mul":
            rest = [name for name in inputs if name not in self._ones]
            return rest[0] if len(rest) == 1 and rest[0] not in self._constants else None
        if kind == "Where" and inputs[0] in self._ones | self._zeros:
            chosen = inputs[1] if inputs[0] in self._ones else inputs[2]
            return None if chosen in self._constants else chosen
        return None


def _agree(masked: Session, whole: Session, graph: bytes) -> bool:
    """Whether two clips give the same with and without masks: a graph may use what it knows of lengths, or rely on a
    mask's shape, in ways of which nothing is known here."""
    names = [output.name for output in onnx.ModelProto.FromString(graph).graph.output]
    noise = np.random.default_rng(0).standard_normal((2, PROBE_SAMPLES)).astype(np.float32) * np.float32(0.05)
    feeds: Feeds = {"waveform": noise, "lengths": np.full(2, PROBE_SAMPLES, np.int64)}
    try:
        pairs = list(zip(masked.run(names, feeds), whole.run(names, feeds), strict=True))
    except Exception:
        # ONNX Runtime's exceptions share no base class. The graph as it is may be too short of samples here.
        return False
    return all(one.shape == other.shape and np.allclose(one, other, rtol=0, atol=TOLERANCE) for one, other in pairs)
