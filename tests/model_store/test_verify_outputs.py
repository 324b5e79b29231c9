"""A graph that runs must give what the bundle says, whatever it is batched with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model_store import Bundle, BundleError, verify_bundle
from model_store.golden import pack, unpack
from model_store.graph import OUTPUTS
from model_store.verify import read_cohort
from tests.model_store.bundles import Array, Draft, draft_of, unit_vectors
from tests.model_store.graphs import BATCH_MAXIMUM, DIM, PADDED_MEAN, RANK, SHORT_VECTORS, graph


def refused(draft: Draft, folder: Path, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        verify_bundle(draft.write(folder / "spoilt"))


def with_golden(draft: Draft, change: Callable[[Array, dict[str, Array]], tuple[Array, dict[str, Array]]]) -> Draft:
    return draft.with_file("golden.npz", pack(*change(*unpack(draft.files["golden.npz"]))))


def test_a_sound_bundle_verifies(bundle: Bundle) -> None:
    verify_bundle(bundle)


def test_a_sound_bundle_without_a_cohort_verifies(draft: Draft, tmp_path: Path) -> None:
    verify_bundle(draft.changed("speaker", cohort_file=None).write(tmp_path / "bundle"))


@pytest.mark.parametrize("error", [2e-4, -2e-4, float("nan")])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_golden_output_that_the_graph_does_not_give(draft: Draft, tmp_path: Path, name: str, error: float) -> None:
    def alter(clip: Array, outputs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs[name].flat[-1] += error
        return clip, outputs

    refused(with_golden(draft, alter), tmp_path, f"golden clip: {name} differs")


def test_a_golden_clip_other_than_the_measured_one(draft: Draft, tmp_path: Path) -> None:
    refused(with_golden(draft, lambda clip, outputs: (-clip, outputs)), tmp_path, "golden clip: keyword_logits differs")


def test_golden_outputs_with_frames_too_many(draft: Draft, tmp_path: Path) -> None:
    def longer(clip: Array, outputs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return clip, {**outputs, "frames": np.concatenate([outputs["frames"]] * 2)}

    refused(with_golden(draft, longer), tmp_path, r"frames has shape \(10, 8\), expected \(20, 8\)")


@pytest.mark.usefixtures("no_runtime")
def test_a_golden_file_that_does_not_read(draft: Draft, tmp_path: Path) -> None:
    refused(draft.with_file("golden.npz", b"sound"), tmp_path, "golden clip does not read")


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("keywords", {"labels": ()}, "labels"),
        ("speaker", {"dim": 4}, "speaker_embedding has 8 values, the manifest says 4|not unit vectors"),
        ("speaker", {"dim": 4, "cohort_file": None}, "speaker_embedding has 8 values, the manifest says 4"),
        ("embedding", {"dim": 16}, "embedding has 8 values, the manifest says 16"),
    ],
)
def test_a_manifest_with_other_dimensions(
    draft: Draft, tmp_path: Path, section: str, values: dict[str, object], reason: str
) -> None:
    refused(draft.changed(section, **values), tmp_path, reason)


def test_a_manifest_with_fewer_labels_than_the_graph(draft: Draft, tmp_path: Path) -> None:
    fewer = draft.changed("keywords", labels=draft.manifest.keywords.labels[:2])
    refused(fewer, tmp_path, "keyword_logits has 4 values, the manifest says 3")


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "0 bytes", id="empty"),
        pytest.param(unit_vectors(5).tobytes()[:-4], "156 bytes, no multiple of 8 float32", id="a value short"),
        pytest.param(unit_vectors(5).tobytes()[:-1], "159 bytes", id="a byte short"),
        pytest.param((1.01 * unit_vectors(5)).tobytes(), "not unit vectors", id="too long"),
        pytest.param(np.zeros((5, DIM), "<f4").tobytes(), "not unit vectors", id="zeros"),
        pytest.param(np.full((5, DIM), np.nan, "<f4").tobytes(), "not unit vectors", id="nan"),
        pytest.param(unit_vectors(5).astype(">f4").tobytes(), "not unit vectors", id="big-endian"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_cohort_that_is_none(draft: Draft, tmp_path: Path, data: bytes, reason: str) -> None:
    refused(draft.with_file("cohort.f32", data), tmp_path, reason)


def test_a_cohort_reads_as_it_was_written() -> None:
    assert np.array_equal(read_cohort(unit_vectors(5).tobytes(), DIM), unit_vectors(5))


@pytest.mark.parametrize("spoil", [BATCH_MAXIMUM, PADDED_MEAN])
def test_a_clip_that_hears_its_neighbours(tmp_path: Path, spoil: str) -> None:
    """Alone it gives its golden outputs; beside louder, quieter and longer clips it does not."""
    refused(draft_of(graph(spoil=spoil).SerializeToString()), tmp_path, "batched golden clip: .* differs by")


def test_speaker_embeddings_that_are_not_unit_vectors(tmp_path: Path) -> None:
    refused(draft_of(graph(spoil=SHORT_VECTORS).SerializeToString()), tmp_path, "speaker_embedding .* unit")


def test_an_output_of_another_rank_than_declared(tmp_path: Path) -> None:
    refused(
        draft_of(graph(spoil=RANK).SerializeToString()),
        tmp_path,
        r"embedding has shape \(1, 1, 8\), not what the contract says",
    )


def test_a_graph_that_the_runtime_refuses(draft: Draft, tmp_path: Path) -> None:
    model = graph()
    model.graph.node[0].op_type = "Shapeless"
    refused(draft.with_file("model.onnx", model.SerializeToString()), tmp_path, "ONNX Runtime refuses the graph")


def test_a_graph_that_takes_one_clip_only(draft: Draft, tmp_path: Path) -> None:
    model = graph()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    refused(draft.with_file("model.onnx", model.SerializeToString()), tmp_path, "the graph does not run")
