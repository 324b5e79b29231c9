"""Clips that fill their batch give the same without masks, and masks are left where that is not known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from model_store import LocalStore, builtin_store_path, whole
from model_store.graph import OUTPUTS, outputs_of
from model_store.inference import open_session
from model_store.whole import open_clips, without_masks
from tests.model_store.graphs import HOP, graph, value

Feeds = dict[str, npt.NDArray[np.generic]]
# Shipped bundles whose graphs use lengths for nothing but masks, by name.
MASKED = ("sotto-edge", "sotto-micro")


def feeds(samples: int, *lengths: int) -> Feeds:
    noise = np.random.default_rng(len(lengths)).standard_normal((len(lengths), samples)) * 0.05
    return {"waveform": noise.astype(np.float32), "lengths": np.array(lengths, np.int64)}


def kinds(data: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def changed(change: Callable[[onnx.GraphProto], None]) -> bytes:
    model = graph()
    change(model.graph)
    return bytes(model.SerializeToString())


def test_masks_go_where_nothing_is_padding() -> None:
    data = bytes(graph().SerializeToString())
    rest = without_masks(data)
    assert rest is not None
    assert {"Less", "Range"} <= set(kinds(data))
    assert not {"Less", "Range", "Cast"} & set(kinds(rest))
    given = feeds(20 * HOP, 20 * HOP, 20 * HOP)
    wanted, found = (open_session(each, threads=1).run(list(OUTPUTS), given) for each in (data, rest))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_padding_is_still_no_part_of_a_clip() -> None:
    data = bytes(graph().SerializeToString())
    clips = open_clips(data, threads=1)
    assert clips.copies == 2
    given = feeds(20 * HOP, 20 * HOP, 7 * HOP)
    wanted, found = (session.run(list(OUTPUTS), given) for session in (open_session(data, threads=1), clips))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one, other)
    own = {"waveform": given["waveform"][1:, : 7 * HOP], "lengths": given["lengths"][1:]}
    for name, one, other in zip(OUTPUTS, clips.run(list(OUTPUTS), own), found, strict=True):
        np.testing.assert_allclose(
            one[0], other[1][: len(one[0])] if one.ndim == 3 else other[1], atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("name", [*MASKED, "sotto-base"])
def test_shipped_clips_give_the_same_without_masks(name: str) -> None:
    bundle = LocalStore(builtin_store_path()).resolve(name)
    data = bundle.read(bundle.manifest.graph.file)
    clips = open_clips(data, threads=1)
    # The larger one's trunk knows of lengths in other ways, and would be in memory twice for nothing.
    assert clips.copies == (2 if name in MASKED else 1)
    names = list(outputs_of(bundle.manifest))
    masked = open_session(data, threads=1)
    for given in (feeds(16_000, 16_000), feeds(9_001, 9_001, 9_001), feeds(9_001, 9_001, 5_000)):
        for output, one, other in zip(names, masked.run(names, given), clips.run(names, given), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=output)


def _mask_as_an_output(own: onnx.GraphProto) -> None:
    own.output.append(value("mask", onnx.TensorProto.FLOAT, "batch", "samples"))


def _lengths_as_a_scale(own: onnx.GraphProto) -> None:
    (node,) = (node for node in own.node if node.output[0] == "total")
    node.output[0] = "sum"
    index = list(own.node).index(node) + 1
    own.node.insert(index, helper.make_node("Cast", ["lengths"], ["samples_of_each"], to=onnx.TensorProto.FLOAT))
    own.node.insert(index + 1, helper.make_node("Unsqueeze", ["samples_of_each", "first"], ["scale"]))
    own.node.insert(index + 2, helper.make_node("Div", ["sum", "scale"], ["total"]))


def _a_branch(own: onnx.GraphProto) -> None:
    inside = helper.make_graph(
        [helper.make_node("Identity", ["mask"], ["same"])], "branch", [], [value("same", onnx.TensorProto.FLOAT)]
    )
    own.node.append(helper.make_node("If", ["all"], ["unused"], then_branch=inside, else_branch=inside))


def _one_more_position(own: onnx.GraphProto) -> None:
    # As frames have that are centred: the last lies at the very end, which no probe of another length shows.
    (node,) = (node for node in own.node if node.op_type == "Range")
    own.node.insert(list(own.node).index(node), helper.make_node("Add", ["samples", "one"], ["more"]))
    node.input[1] = "more"


def _another_step(own: onnx.GraphProto) -> None:
    (node,) = (node for node in own.node if node.op_type == "Range")
    own.initializer.append(onnx.numpy_helper.from_array(np.array(HOP, np.int64), "hop"))
    node.input[2] = "hop"


def _a_number_of_its_own(own: onnx.GraphProto) -> None:
    (node,) = (node for node in own.node if node.op_type == "Less")
    own.initializer.append(onnx.numpy_helper.from_array(np.array([4000], np.int64), "least"))
    node.input[0] = "least"


@pytest.mark.parametrize(
    "change",
    [_mask_as_an_output, _lengths_as_a_scale, _a_branch, _one_more_position, _another_step, _a_number_of_its_own],
)
def test_a_graph_that_knows_lengths_otherwise_stays_as_it_is(change: Callable[[onnx.GraphProto], None]) -> None:
    assert without_masks(changed(change)) is None


def test_nodes_without_inputs_are_passed_over() -> None:
    def draw(own: onnx.GraphProto) -> None:
        own.node.insert(0, helper.make_node("RandomNormal", [], ["drawn"], shape=[1]))

    assert without_masks(changed(draw)) is not None


def test_what_cannot_be_rewritten_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: bytes) -> bytes:
        raise IndexError

    monkeypatch.setattr(whole, "without_masks", fail)
    assert open_clips(bytes(graph().SerializeToString()), threads=1).copies == 1


def test_a_graph_that_relies_on_a_masks_shape_stays_as_it_is() -> None:
    def spread(own: onnx.GraphProto) -> None:
        # The first sample of each clip, by as many ones as it has samples.
        (node,) = (node for node in own.node if node.output[0] == "heard")
        first = helper.make_node("Slice", ["waveform", "start", "stop", "axis"], ["sample"])
        own.initializer.extend(
            onnx.numpy_helper.from_array(np.array([number], np.int64), name)
            for name, number in (("start", 0), ("stop", 1), ("axis", 1))
        )
        own.node.insert(list(own.node).index(node), first)
        node.input[0] = "sample"

    data = changed(spread)
    assert without_masks(data) is not None
    clips = open_clips(data, threads=1)
    assert clips.copies == 1
    given = feeds(20 * HOP, 20 * HOP)
    wanted = open_session(data, threads=1).run(list(OUTPUTS), given)
    for one, other in zip(wanted, clips.run(list(OUTPUTS), given), strict=True):
        np.testing.assert_array_equal(one, other)
