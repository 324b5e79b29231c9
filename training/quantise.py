"""Clips computed in eight bits: activations and weights of the convolutions, with scales fixed from real speech.

ONNX Runtime's static quantisation (QuantizeLinear and DequantizeLinear around what is rounded): activations as uint8
with one scale a tensor, between the least and greatest values that recordings of `train` gave; weights as int8 with one
scale an output channel. No scale depends on the audio, so neither on what a clip was batched with, as those of dynamic
quantisation do. Weights keep seven of their eight bits: processors without VNNI add products of two in 16 bits, which
would overflow with eight.

What is sensitive stays in float: features and the first convolution on them, whose single channel would gain nothing,
sums over time and the heads; their weights are float16 in the file. Masks are applied in float, where they are
exact.
The streaming graph computes in float with weights as `sotto compact` keeps them: its calls are too short to gain.
What all this does to detections and scores is for the recognition rows to say (`sotto evaluate`).
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from model_store import Manifest
from model_store.store import open_bundle
from training.audio_cache import SAMPLE_RATE_HZ, decode
from training.compact import LEAST_VALUES, in_eight_bits, rewrite
from training.errors import ExportError
from training.evaluation.profile import profile_table
from training.export import to_onnx, traced
from training.finished import open_run, origin
from training.layout import narrow_masks
from training.students.edge import is_convolutional

CLIPS = 200
LONGEST_S = 3.0
KINDS = ("Conv", "Add", "Relu")
# Of the nodes' names, which are the modules': blocks, changes of width, stems but for their first, and
# what says how much each frame counts in pooling.
INSIDE = re.compile(
    r"^/student/(speaker_)?(stem|early|down|shared|(to_)?keyword|to_speaker|speaker|pool/score)[./](?!first|Mul)"
)

Array = npt.NDArray[np.float32]


def quantise(draft: Path, *, data_root: Path | None) -> Manifest:
    """Rewrite the graphs of the draft, and the outputs that its golden clip is to give. Raises StoreError,
    ExportError, ManifestError."""
    bundle = open_bundle(draft)
    before = bundle.manifest
    if before.graph.weights != "float32":
        raise ExportError(f"{draft} has been rounded already; export it again")
    whole = bundle.read(before.graph.file)
    graph = computed_in_eight_bits(whole, _recordings(before.lineage.recipe, data_root))
    stream = None
    if before.stream is not None:
        _, alike = in_eight_bits(whole)
        stream, _ = in_eight_bits(bundle.read(before.stream.file), alike)
    return rewrite(draft, bundle, graph, stream, weights="int8", arithmetic="int8")


def compare_forms(run: Path, *, data_root: Path | None) -> list[str]:
    """The table of `profile_table` for a finished run's clip graph: as torch writes it, in the layout that ships, and
    in eight bits. Raises RunError, ExportError, ManifestError."""
    finished = open_run(run)
    if not is_convolutional(finished.network):
        raise ExportError(f"{run} is no run of `sotto train` without a trunk; other networks have one form only")
    blocked = to_onnx(finished.network)
    rounded = computed_in_eight_bits(blocked, _recordings(finished.lineage.recipe, data_root))
    return profile_table(
        {"as torch writes it": traced(finished.network), "in blocks": blocked, "in eight bits": rounded}
    )


def _recordings(recipe: dict[str, Any], data_root: Path | None) -> Iterator[Array]:
    source = origin(recipe)
    clips = source.choose(source.read(data_root).split("train"))
    for clip in random.Random(source.seed).sample(clips, min(CLIPS, len(clips))):
        yield decode(clip.path)[: int(LONGEST_S * SAMPLE_RATE_HZ)]


def computed_in_eight_bits(graph: bytes, waveforms: Iterable[Array]) -> bytes:
    """The clip graph of an `Edge`, its scales fitted on the waveforms [N]. Raises ExportError for one in which there is
    nothing to round."""
    model = onnx.load_from_string(graph)
    narrow_masks(model.graph)
    rounded = [node.name for node in model.graph.node if node.op_type in KINDS and INSIDE.match(node.name)]
    if not rounded:
        raise ExportError("the graph has no layer that could be computed in eight bits; only those of `Edge` have")
    with TemporaryDirectory() as work, _without_advice():
        given, made = Path(work) / "given.onnx", Path(work) / "made.onnx"
        onnx.save(model, given)
        quantize_static(
            given,
            made,
            _Recordings(waveforms),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(KINDS),
            nodes_to_quantize=rounded,
        )
        model = onnx.load(made)
    _halve(model.graph)
    return bytes(model.SerializeToString())


class _Recordings(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime ships no types
    def __init__(self, waveforms: Iterable[Array]) -> None:
        self._waveforms = iter(waveforms)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        waveform = next(self._waveforms, None)
        if waveform is None:
            return None
        return {"waveform": waveform[None], "lengths": np.array([len(waveform)], dtype=np.int64)}


@contextmanager
def _without_advice() -> Iterator[None]:
    """ONNX Runtime recommends steps that change nothing here, through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _halve(graph: onnx.GraphProto) -> None:
    """Keep kernels and matrices that are still float32 as float16, which ONNX Runtime undoes as it loads."""
    used = {name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") for name in node.input[1:2]}
    kept, before = [], []
    for tensor in graph.initializer:
        large = int(np.prod(tensor.dims)) >= LEAST_VALUES and tensor.data_type == onnx.TensorProto.FLOAT
        # What transforms the waveform needs all its digits: quiet speech is to be told from hiss.
        if tensor.name not in used or not large or "features" in tensor.name:
            kept.append(tensor)
            continue
        half = f"{tensor.name}_half"
        kept.append(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), half))
        before.append(helper.make_node("Cast", [half], [tensor.name], to=onnx.TensorProto.FLOAT))
    nodes = [*before, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
