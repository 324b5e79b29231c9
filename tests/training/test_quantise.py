"""Clips in eight bits: nearly what they were, whatever they share a call with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from model_store import BundleError, LocalStore, Manifest, golden, verify_bundle
from model_store.files import describe
from model_store.graph import OUTPUTS, part_of
from model_store.inference import computes_in_eight_bits, open_session
from model_store.store import MANIFEST, open_bundle
from training.compact import compact, in_eight_bits
from training.errors import ExportError
from training.evaluation.cost import multiply_accumulates
from training.evaluation.profile import operators_ms, profile_table
from training.export import run_graph, to_onnx
from training.quantise import computed_in_eight_bits, quantise
from training.students.edge import Edge, EdgeShape

LEVELS = (0.3, 0.0005, 0.03, 0.9, 0.08)


def noise(seed: int, seconds: float, level: float) -> np.ndarray:
    """Louder and quieter in turn, as speech is."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * 16_000))
    swell = 0.55 + 0.45 * np.sin(np.arange(len(samples)) / 1600)
    return (samples * swell * level).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> bytes:
    torch.manual_seed(3)
    student = Edge(6, EdgeShape(speaker_from="features", ahead=1))
    with torch.no_grad():
        # Statistics of norms as training leaves them; without, a deep network's outputs hardly move.
        student.train()
        for step in range(4):
            clips = torch.from_numpy(np.stack([noise(step * 10 + row, 1.0, level) for row, level in enumerate(LEVELS)]))
            student(clips, torch.full((len(LEVELS),), 16_000))
    return to_onnx(student.eval())


@pytest.fixture(scope="module")
def rounded(graph: bytes) -> bytes:
    return computed_in_eight_bits(graph, (noise(seed, 2.0, level) for seed, level in enumerate(LEVELS * 4)))


def test_outputs_are_nearly_the_same_from_a_third_of_the_file(graph: bytes, rounded: bytes) -> None:
    assert len(rounded) * 5 < len(graph) * 2
    before, after = (open_session(each, threads=1) for each in (graph, rounded))
    for level in LEVELS:
        clips = [noise(99, 1.5, level)]
        wanted, found = run_graph(before, clips), run_graph(after, clips)
        for name in OUTPUTS:
            golden.resemble(name, wanted[name], found[name])
            assert not np.array_equal(wanted[name], found[name])


def test_neighbours_and_padding_change_nothing(rounded: bytes) -> None:
    """Long, loud and silent ones; and the shortest of clips are no number's limit."""
    session = open_session(rounded, threads=1)
    clips = [noise(1, 0.1, 0.1), noise(2, 3.0, 0.9), np.zeros(8_000, np.float32), noise(3, 1.01, 0.001)]
    together = run_graph(session, clips)
    for row, clip in enumerate(clips):
        alone = run_graph(session, [clip])
        for name in OUTPUTS:
            own = together[name][row]
            own = own[: len(alone[name][0])] if own.ndim == 2 else own
            assert np.isfinite(own).all()
            assert np.abs(own - alone[name][0]).max() < 1e-6


def test_convolutions_are_computed_on_integers_and_the_rest_is_not(
    rounded: bytes, loaded: Callable[[bytes], list[onnx.NodeProto]]
) -> None:
    nodes = loaded(rounded)
    integer = [node for node in nodes if node.op_type == "QLinearConv"]
    real = [node for node in nodes if node.op_type in ("Conv", "MatMul", "Gemm")]
    # Each block has three, and there are twelve; two of the pooling.
    assert len(integer) > 38
    # Five products of the features, both stems' first, one head a task.
    assert 8 <= len(real) <= 10
    assert "Cast" not in [node.op_type for node in nodes if any(name.endswith("_half") for name in node.input)]


def test_weights_keep_seven_bits_so_that_no_processor_overflows(rounded: bytes) -> None:
    levels = [numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(rounded).graph.initializer]
    kernels = [values for values in levels if values.dtype == np.int8 and values.ndim == 4]
    assert kernels
    assert all(np.abs(values.astype(int)).max() <= 64 for values in kernels)


def test_a_part_of_it_is_computed_in_eight_bits_too_and_products_are_counted_as_before(
    graph: bytes, rounded: bytes
) -> None:
    assert computes_in_eight_bits(part_of(rounded, ("keyword_logits",)))
    assert not computes_in_eight_bits(in_eight_bits(graph)[0])
    # The masks' spreading over channels is not there any more.
    assert 0.98 < multiply_accumulates(rounded) / multiply_accumulates(graph) <= 1


def test_a_graph_of_other_layers_is_refused() -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["waveform"], ["frames"], name="/trunk/Relu")
    waveform, frames = (value(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("waveform", "frames"))
    other = onnx.helper.make_model(onnx.helper.make_graph([node], "other", [waveform], [frames]))
    with pytest.raises(ExportError, match="no layer"):
        computed_in_eight_bits(other.SerializeToString(), [])


@pytest.fixture(scope="module")
def draft(made_draft: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(made_draft[0], tmp_path_factory.mktemp("quantised") / "draft")
    quantise(folder, data_root=None)
    return folder


def test_a_draft_is_published_and_says_what_it_is(
    draft: Path, made_draft: tuple[Path, Manifest], tmp_path: Path
) -> None:
    manifest = open_bundle(draft).manifest
    assert (manifest.graph.weights, manifest.graph.arithmetic) == ("int8", "int8")
    assert manifest.keywords == made_draft[1].keywords
    assert manifest.files["model.onnx"].size < made_draft[1].files["model.onnx"].size
    verify_bundle(LocalStore(tmp_path / "store").publish(manifest, _files(draft, manifest)))


def test_a_profile_counts_what_runs_and_how_long(graph: bytes, rounded: bytes) -> None:
    lines = profile_table({"float": graph, "rounded": rounded})
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines}
    assert cells["operator"] == ["float", "rounded"]
    spent, nodes = operators_ms(rounded, runs=5)
    assert cells["QLinearConv"][0] == "-"
    assert cells["QLinearConv"][1].endswith(f" ms, {nodes['QLinearConv']}")
    assert all(duration > 0 for duration in spent.values())
    assert all(float(cell.removesuffix(" ms")) > 0 for cell in cells["a call, unprofiled"])


def test_a_draft_is_rounded_once(draft: Path, made_draft: tuple[Path, Manifest], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="rounded already"):
        quantise(draft, data_root=None)
    other = shutil.copytree(made_draft[0], tmp_path / "compact")
    compact(other)
    with pytest.raises(ExportError, match="rounded already"):
        quantise(other, data_root=None)


def test_a_manifest_that_says_otherwise_is_refused(draft: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(draft, tmp_path / "draft")
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text.replace('"arithmetic": "int8"', '"arithmetic": "float32"'), encoding="utf-8")
    with pytest.raises(BundleError, match="says that the graph computes in float32"):
        verify_bundle(open_bundle(folder))


def test_a_golden_clip_of_another_model_is_refused(draft: Path, tmp_path: Path) -> None:
    """What rounding may change is far less than what other weights do."""
    manifest = open_bundle(draft).manifest
    files = _files(draft, manifest)
    clip, outputs = golden.unpack(files["golden.npz"], tuple(OUTPUTS))
    outputs["keyword_logits"] = np.roll(outputs["keyword_logits"], 1, axis=1)
    files["golden.npz"] = golden.pack(clip, outputs)
    listed = {**manifest.files, "golden.npz": describe(files["golden.npz"])}
    bundle = LocalStore(tmp_path / "store").publish(manifest.model_copy(update={"files": listed}), files)
    with pytest.raises(BundleError, match="of its spread"):
        verify_bundle(bundle)


def _files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in manifest.files}
