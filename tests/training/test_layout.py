"""The rewritten graph computes the same, and ONNX Runtime keeps its blocked layout in it."""

import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model_store.graph import OUTPUTS
from model_store.inference import open_session
from tests.training.chain import tiny_hubert
from training.export import run_graph, to_onnx, traced
from training.layout import LONG_KERNEL, ONES, in_two_dimensions
from training.students.edge import Edge, EdgeShape
from training.students.joint import JointModel
from training.teachers import SelfSupervised


@pytest.fixture(scope="module")
def student() -> Edge:
    torch.manual_seed(3)
    return Edge(6).eval()


def optimised(graph: bytes, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def reorders(graph: bytes, folder: Path) -> int:
    """How often it then changes the layout."""
    return sum(node.op_type.startswith("Reorder") for node in optimised(graph, folder).graph.node)


def test_the_same_outputs_with_a_third_of_the_conversions(student: Edge, tmp_path: Path) -> None:
    before, after = traced(student), to_onnx(student)
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(size) * 0.1).astype(np.float32) for size in (1700, 16_000, 40_001)]
    wanted, found = (run_graph(open_session(graph, threads=1), clips) for graph in (before, after))
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
    assert reorders(after, tmp_path) * 3 <= reorders(before, tmp_path)


def test_a_mask_is_spread_once_for_each_width(student: Edge) -> None:
    nodes = onnx.load_from_string(to_onnx(student)).graph.node
    spread = [node for node in nodes if node.op_type == "Conv" and node.input[1].endswith(ONES)]
    # One mask at the rate of the stem, for one width; one at the rate of the frames, for two.
    assert len({node.input[0] for node in spread}) == 2
    assert len(spread) == 1 + len({student.shape.shared_width, student.shape.task_width})


def test_padding_more_on_one_side_costs_no_operator(tmp_path: Path) -> None:
    torch.manual_seed(3)
    even, uneven = (Edge(6, EdgeShape(ahead=ahead)).eval() for ahead in (None, 1))
    before, after = traced(uneven), to_onnx(uneven)
    clip = (np.random.default_rng(0).standard_normal(16_000) * 0.1).astype(np.float32)
    wanted, found = (run_graph(open_session(graph, threads=1), [clip]) for graph in (before, after))
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
    # Those of the features alone, which pad the waveform.
    padding = [node for node in onnx.load_from_string(after).graph.node if node.op_type == "Pad"]
    assert all("features" in node.name for node in padding)
    assert reorders(after, tmp_path) == reorders(to_onnx(even), tmp_path)


def test_convolutions_over_time_get_a_height_and_the_same_outputs() -> None:
    torch.manual_seed(0)
    model = JointModel(SelfSupervised(tiny_hubert(), normalise=True), 5, speaker_dim=8).eval()
    before = traced(model)
    after = in_two_dimensions(before)
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(size) * 0.1).astype(np.float32) for size in (1700, 16_000, 40_001)]
    wanted, found = (run_graph(open_session(graph, threads=1), clips) for graph in (before, after))
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
    assert set(kernels(before)) == {3}
    assert set(kernels(after)) == {4}
    assert len(kernels(after)) == len(kernels(before)) == 8  # seven of the CNN and the positional one
    assert in_two_dimensions(after) == after


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_layers_may_share_a_kernel() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    network, x = Twice().eval(), torch.randn(2, 4, 9)
    (found,) = open_session(flattened(network, x), threads=1).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("taps", [LONG_KERNEL - 2, LONG_KERNEL, 4 * LONG_KERNEL])
def test_zeros_of_long_kernels_stay_outside_of_the_convolution(taps: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv1d(32, 32, taps, padding=taps // 2, groups=2).eval()
    graph = flattened(network, torch.randn(2, 32, 9))
    session = open_session(graph, threads=1)
    # Shorter than the kernel, and longer.
    for batch, frames in ((1, 2), (3, 5 * taps)):
        x = torch.randn(batch, 32, frames)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-5)
    (convolution,) = (node for node in optimised(graph, tmp_path).graph.node if node.op_type == "Conv")
    pads = next(attribute.ints for attribute in convolution.attribute if attribute.name == "pads")
    assert any(pads) == (taps < LONG_KERNEL)


def test_attention_is_written_out_in_graphs_only() -> None:
    model = JointModel(SelfSupervised(tiny_hubert(), normalise=True), 5, speaker_dim=8).eval()
    trunk = model.trunk.model
    assert trunk.config._attn_implementation == "sdpa"
    operators = {node.op_type for node in onnx.load_from_string(traced(model)).graph.node}
    assert "Softmax" in operators
    assert "IsNaN" not in operators
    assert trunk.config._attn_implementation == "sdpa"


def flattened(network: torch.nn.Module, x: torch.Tensor) -> bytes:
    """The network's graph with heights."""
    stream = io.BytesIO()
    axes = {"x": {0: "batch", 2: "frames"}}
    torch.onnx.export(network, (x,), stream, input_names=["x"], dynamic_axes=axes, dynamo=False)
    return in_two_dimensions(stream.getvalue())


def kernels(graph: bytes) -> list[int]:
    """The dimensions of every convolution's kernel."""
    found = onnx.load_from_string(graph).graph
    dimensions = {tensor.name: len(tensor.dims) for tensor in found.initializer}
    return [dimensions[node.input[1]] for node in found.node if node.op_type == "Conv"]
