"""Bundles with a streaming graph: what must hold of it before anybody is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_store import BundleError, StreamInfo, verify_bundle
from model_store.inference import open_session
from model_store.streaming import ENDLESS, Chunk, StreamingGraph
from tests.model_store.bundles import Draft, draft_of
from tests.model_store.graphs import HOP, LABELS, OPSET, graph, value

INFO = StreamInfo(file="stream.onnx", delay_frames=0, state_size=1)
NOTHING, HEARS_THE_OTHERS, SCALED = "", "hears the others", "scaled"


def stream_graph(spoil: str = NOTHING) -> bytes:
    """The logits of the tiny clip graph, whose frames are of their own samples alone; counts calls in the state."""
    weights = next(one for one in graph().graph.initializer if one.name == "to_logits")
    values = numpy_helper.to_array(weights) * np.float32(1.01 if spoil == SCALED else 1.0)
    constants = {
        "to_logits": values,
        "zero": np.zeros((), np.int64),
        "one": np.ones((), np.int64),
        "first": np.array([1], np.int64),
        "hop": np.array(HOP, np.int64),
        "step": np.ones((1, 1), np.float32),
        "none": np.array([0], np.int64),
        "nothing": np.zeros((1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Shape", ["samples"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["count"]),
        helper.make_node("Range", ["zero", "count", "one"], ["places"]),
        helper.make_node("Mul", ["position", "hop"], ["begin"]),
        helper.make_node("Unsqueeze", ["begin", "first"], ["begins"]),
        helper.make_node("Add", ["places", "begins"], ["at"]),
        helper.make_node("Unsqueeze", ["length", "first"], ["ends"]),
        helper.make_node("Less", ["at", "ends"], ["within"]),
        helper.make_node("Cast", ["within"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["samples", "mask"], ["heard"]),
        # Of all in the call but itself.
        helper.make_node("ReduceSum", ["heard", "none"], ["everything"]),
        helper.make_node("Sub", ["everything", "heard"], ["others"]),
        helper.make_node("Add", ["heard", "others" if spoil == HEARS_THE_OTHERS else "nothing"], ["sum"]),
        helper.make_node("Unsqueeze", ["sum", "first"], ["signal"]),
        helper.make_node("Conv", ["signal", "to_logits"], ["logits"], strides=[HOP]),
        helper.make_node("Transpose", ["logits"], ["keyword_logits"], perm=[0, 2, 1]),
        helper.make_node("Add", ["state", "step"], ["new_state"]),
    ]  # fmt: skip
    made = helper.make_graph(
        nodes,
        "stream",
        [
            value("samples", TensorProto.FLOAT, "batch", "samples"),
            value("position", TensorProto.INT64, "batch"),
            value("length", TensorProto.INT64, "batch"),
            value("state", TensorProto.FLOAT, "batch", 1),
        ],
        [
            value("keyword_logits", TensorProto.FLOAT, "batch", "frames", LABELS),
            value("new_state", TensorProto.FLOAT, "batch", 1),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return bytes(model.SerializeToString())


def draft(streamed: bytes, info: StreamInfo = INFO) -> Draft:
    made = draft_of(graph().SerializeToString()).with_file(info.file, streamed)
    return replace(made, manifest=made.manifest.model_copy(update={"stream": info}))


def test_a_good_one_is_verified(tmp_path: Path) -> None:
    bundle = draft(stream_graph()).write(tmp_path / "bundle")
    verify_bundle(bundle)
    assert bundle.manifest.stream == INFO


@pytest.mark.parametrize(
    ("spoil", "info", "message"),
    [
        (SCALED, INFO, "golden clip by 1 frames"),
        (HEARS_THE_OTHERS, INFO, "as one of two streams"),
        (NOTHING, INFO.model_copy(update={"delay_frames": 3}), "golden clip by 1 frames"),
        (NOTHING, INFO.model_copy(update={"state_size": 5}), "does not run"),
    ],
)
def test_one_that_does_not_give_what_the_clip_graph_gives_is_refused(
    spoil: str, info: StreamInfo, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        verify_bundle(draft(stream_graph(spoil), info).write(tmp_path / "bundle"))


def test_one_without_the_contract_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(stream_graph())
    model.graph.input[1].name = "place"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "position":
                node.input[index] = "place"
    with pytest.raises(BundleError, match="inputs"):
        verify_bundle(draft(model.SerializeToString()).write(tmp_path / "bundle"))
    with pytest.raises(BundleError, match="ONNX"):
        verify_bundle(draft(b"no graph").write(tmp_path / "other"))


def test_a_file_that_is_not_listed_cannot_be_the_streaming_graph() -> None:
    made = draft_of(graph().SerializeToString())
    fields = {**made.fields(), "stream": INFO.model_dump()}
    with pytest.raises(ValueError, match=r"stream\.onnx"):
        type(made.manifest).model_validate_json(json.dumps(fields))


def test_a_stream_ends_where_it_ends_whatever_follows() -> None:
    streaming = StreamingGraph(open_session(stream_graph(), threads=1), INFO, hop=HOP)
    samples = np.ones(3 * HOP, np.float32)
    ((whole, progress),) = streaming.run([Chunk(streaming.begin(), samples)])
    ((ended, _),) = streaming.run([Chunk(streaming.begin(), samples, HOP + 1)])
    assert (whole.shape, ended.shape) == ((3, LABELS), (2, LABELS))
    assert progress.position == 3
    assert progress.state.tolist() == [1.0]
    assert not np.allclose(ended[1], whole[1])


def test_frames_before_the_first_and_after_the_last_are_not_given() -> None:
    late = INFO.model_copy(update={"delay_frames": 2})
    streaming = StreamingGraph(open_session(stream_graph(), threads=1), late, hop=HOP)
    progress, counts = streaming.begin(), []
    for length in (ENDLESS, ENDLESS, 4 * HOP, 4 * HOP):
        ((logits, progress),) = streaming.run([Chunk(progress, np.ones(3 * HOP, np.float32), length)])
        counts.append(len(logits))
    # Frames -2 to 0, 1 to 3, then those from the fourth on, of a stream of four frames.
    assert counts == [1, 3, 0, 0]
