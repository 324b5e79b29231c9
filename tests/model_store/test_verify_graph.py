"""A graph that reaches outside itself or breaks the contract never reaches ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from model_store import BundleError, verify_bundle
from model_store.graph import MOST_NODES
from tests.model_store.bundles import Draft
from tests.model_store.graphs import (
    DIM,
    LABELS,
    PLACES,
    contract_outputs,
    graph,
    node_at,
    outside_tensor,
    tensor_at,
    value,
)

pytestmark = pytest.mark.usefixtures("no_runtime")


def refused(draft: Draft, folder: Path, model: onnx.ModelProto | bytes, reason: str) -> None:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    written = draft.with_file("model.onnx", data).write(folder / "spoilt")
    with pytest.raises(BundleError, match=reason):
        verify_bundle(written)


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_kept_in_another_file(draft: Draft, tmp_path: Path, place: str) -> None:
    model = graph()
    tensor_at(model, place, outside_tensor("weights.bin"))
    refused(draft, tmp_path, model, "tensor 'hidden' keeps its data in another file")


@pytest.mark.parametrize(
    "location", ["model.onnx", "../../x", "/etc/passwd", "a/../../x", "", "*/_ORT_MEM_ADDR_/*", "file:///etc/passwd"]
)
def test_wherever_that_file_is(draft: Draft, tmp_path: Path, location: str) -> None:
    model = graph()
    model.graph.initializer.append(outside_tensor(location))
    refused(draft, tmp_path, model, "keeps its data in another file")


def test_a_location_without_the_flag(draft: Draft, tmp_path: Path) -> None:
    model = graph()
    model.graph.initializer.append(outside_tensor("weights.bin", flagged=False))
    refused(draft, tmp_path, model, "keeps its data in another file")


@pytest.mark.parametrize("place", ["graph", "subgraph", "function", "function subgraph"])
def test_an_operator_of_a_foreign_domain(draft: Draft, tmp_path: Path, place: str) -> None:
    model = graph()
    node_at(model, place, helper.make_node("Run", [], ["x"], domain="com.evil"))
    refused(draft, tmp_path, model, "uses operators of com.evil")


@pytest.mark.parametrize("opset", [13, 16, 18])
def test_an_opset_that_is_not_the_manifests(draft: Draft, tmp_path: Path, opset: int) -> None:
    model = graph()
    model.opset_import[0].version = opset
    refused(draft, tmp_path, model, rf"is opset \[{opset}\], the manifest says 17")


def test_two_opsets_of_one_domain(draft: Draft, tmp_path: Path) -> None:
    model = graph()
    model.opset_import.append(helper.make_opsetid("ai.onnx", 18))
    refused(draft, tmp_path, model, r"is opset \[17, 18\]")


def test_more_nodes_than_any_model_needs(draft: Draft, tmp_path: Path) -> None:
    model = graph()
    idle = helper.make_node("Identity", ["waveform"], ["x"])
    model.graph.node.extend([idle] * MOST_NODES)
    refused(draft, tmp_path, model, f"nodes, allowed are {MOST_NODES}")


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(contract_outputs()[:3], id="one missing"),
        pytest.param([*contract_outputs(), value("more", TensorProto.FLOAT, "batch")], id="one too many"),
        pytest.param([value("logits", TensorProto.FLOAT, "b", "t", LABELS), *contract_outputs()[1:]], id="other name"),
        pytest.param([*contract_outputs()[:3], value("frames", TensorProto.FLOAT, "b", DIM)], id="other rank"),
        pytest.param([*contract_outputs()[:3], value("frames", TensorProto.FLOAT16, "b", "t", DIM)], id="other type"),
    ],
)
def test_outputs_other_than_the_contracts(draft: Draft, tmp_path: Path, outputs: list[onnx.ValueInfoProto]) -> None:
    refused(draft, tmp_path, graph(outputs=outputs), "outputs .* the contract says")


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param([value("waveform", TensorProto.FLOAT, "b", "n")], id="one missing"),
        pytest.param(
            [value("audio", TensorProto.FLOAT, "b", "n"), value("lengths", TensorProto.INT64, "b")], id="other name"
        ),
        pytest.param(
            [value("waveform", TensorProto.DOUBLE, "b", "n"), value("lengths", TensorProto.INT64, "b")], id="other type"
        ),
        pytest.param(
            [value("waveform", TensorProto.FLOAT, "b", "n"), value("lengths", TensorProto.INT32, "b")], id="int32"
        ),
        pytest.param(
            [value("waveform", TensorProto.FLOAT, "b", 1, "n"), value("lengths", TensorProto.INT64, "b")], id="rank 3"
        ),
        pytest.param(
            [value("waveform", TensorProto.FLOAT, "b", "n"), value("lengths", TensorProto.INT64, "b"),
             value("gain", TensorProto.FLOAT)], id="one too many",
        ),
    ],
)  # fmt: skip
def test_inputs_other_than_the_contracts(draft: Draft, tmp_path: Path, inputs: list[onnx.ValueInfoProto]) -> None:
    model = graph()
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    refused(draft, tmp_path, model, "inputs .* the contract says")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x04\x95", id="pickle"),
        pytest.param(b"<html></html>", id="page"),
        pytest.param(graph().SerializeToString()[:-100], id="truncated"),
        pytest.param(onnx.ModelProto().SerializeToString(), id="nothing in it"),
        *(pytest.param(np.random.default_rng(seed).bytes(4096), id=f"random {seed}") for seed in range(8)),
    ],
)
def test_what_is_no_graph(draft: Draft, tmp_path: Path, data: bytes) -> None:
    refused(draft, tmp_path, data, r"model\.onnx (is not an ONNX model|is opset)")


def test_an_onnx_file_that_the_runtime_would_read_as_another_format(draft: Draft, tmp_path: Path) -> None:
    """ONNX Runtime takes bytes with `ORTM` at 4 for its own format; here they are an ONNX field nobody knows."""
    both = b"\x7a\x84\x80\x00ORTM" + graph().SerializeToString()
    assert len(onnx.ModelProto.FromString(both).graph.node) == len(graph().graph.node)
    refused(draft, tmp_path, both, "ONNX Runtime would read")
