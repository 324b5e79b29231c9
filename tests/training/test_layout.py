"""The rewritten graph computes the same, and ONNX Runtime keeps its blocked layout in it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model_store.graph import OUTPUTS
from model_store.inference import open_session
from training.export import run_graph, to_onnx, traced
from training.students.edge import Edge


@pytest.fixture(scope="module")
def student() -> Edge:
    torch.manual_seed(3)
    return Edge(6).eval()


def reorders(graph: bytes, folder: Path) -> int:
    """How often the graph that ONNX Runtime makes of this one changes the layout."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    return sum(node.op_type.startswith("Reorder") for node in nodes)


def test_the_same_outputs_with_a_third_of_the_conversions(student: Edge, tmp_path: Path) -> None:
    before, after = traced(student), to_onnx(student)
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(size) * 0.1).astype(np.float32) for size in (1700, 16_000, 40_001)]
    wanted, found = (run_graph(open_session(graph, threads=1), clips) for graph in (before, after))
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
    assert reorders(after, tmp_path) * 3 <= reorders(before, tmp_path)
