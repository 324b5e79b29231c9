"""Weights in eight bits: small in the file, float when it runs, and as independent of neighbours as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_store import LocalStore, Manifest, verify_bundle
from model_store.graph import OUTPUTS
from model_store.inference import open_session
from model_store.store import open_bundle
from training.compact import compact, in_eight_bits, quantised
from training.evaluation.cost import multiply_accumulates
from training.export import run_graph, to_onnx
from training.students.edge import Edge


@pytest.fixture(scope="module")
def graph() -> bytes:
    torch.manual_seed(3)
    return to_onnx(Edge(6).eval())


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2]), st.floats(1e-6, 1e3))
def test_every_value_is_within_half_a_step_of_its_channel(seed: int, axis: int, level: float) -> None:
    values = (np.random.default_rng(seed).standard_normal((5, 4, 3)) * level).astype(np.float32)
    levels, scales = quantised(values, axis)
    shape = [1, 1, 1]
    shape[axis] = -1
    steps = scales.reshape(shape)
    assert np.all(np.abs(levels * steps - values) <= 0.5001 * steps)


def test_a_channel_of_zeros_stays_zero() -> None:
    levels, scales = quantised(np.zeros((2, 3), dtype=np.float32), 0)
    assert not levels.any()
    assert np.isfinite(scales).all()


def test_the_file_is_a_third_and_its_outputs_nearly_the_same(graph: bytes) -> None:
    small, _ = in_eight_bits(graph)
    assert len(small) * 3 < len(graph)
    clips = [(np.random.default_rng(5).standard_normal(16_000) * 0.1).astype(np.float32)]
    wanted, found = (run_graph(open_session(each, threads=1), clips) for each in (graph, small))
    for name in OUTPUTS:
        alike = np.sum(wanted[name] * found[name]) / np.linalg.norm(wanted[name]) / np.linalg.norm(found[name])
        assert alike > 0.999
    assert any(not np.array_equal(wanted[name], found[name]) for name in OUTPUTS)


def test_what_is_loaded_computes_in_float(graph: bytes, loaded: Callable[[bytes], list[onnx.NodeProto]]) -> None:
    nodes = {node.op_type for node in loaded(in_eight_bits(graph)[0])}
    assert "DequantizeLinear" not in nodes
    assert "Conv" in nodes


def test_twice_is_once_and_products_are_counted_as_before(graph: bytes) -> None:
    small, _ = in_eight_bits(graph)
    assert in_eight_bits(small) == (small, [])
    assert multiply_accumulates(small) == multiply_accumulates(graph)


@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_a_weight_that_was_folded_at_another_precision_is_rounded_as_its_like(size: float) -> None:
    weight = (np.random.default_rng(2).standard_normal((32, 32)) * size).astype(np.float32)
    other = np.nextafter(weight, np.float32(np.inf))
    _, rounded = in_eight_bits(product(weight))
    assert len(rounded) == 1
    assert in_eight_bits(product(other), rounded)[0] == in_eight_bits(product(weight))[0]
    assert in_eight_bits(product(weight * np.float32(1.01)), rounded)[1] == []


def product(weight: np.ndarray) -> bytes:
    """A graph that multiplies with it."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 32]) for name in ("x", "y")]
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    tensor = onnx.numpy_helper.from_array(weight, "weight")
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", ends[:1], ends[1:], [tensor])
    ).SerializeToString()


def test_a_compact_draft_is_published_and_says_what_it_is(made_draft: tuple[Path, Manifest], tmp_path: Path) -> None:
    draft = shutil.copytree(made_draft[0], tmp_path / "draft")
    before = open_bundle(draft).manifest
    manifest = compact(draft)
    assert manifest.graph.weights == "int8"
    assert manifest.files["model.onnx"].size < before.files["model.onnx"].size
    assert manifest.keywords == before.keywords
    files = {name: (draft / name).read_bytes() for name in manifest.files}
    verify_bundle(LocalStore(tmp_path / "store").publish(manifest, files))
