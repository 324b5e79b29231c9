"""The manifest refuses whatever could switch a default on unseen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from model_store import Keyword, Manifest
from tests.model_store.bundles import Draft

HASH = "ab" * 32


def read(fields: dict[str, Any]) -> Manifest:
    return Manifest.model_validate_json(json.dumps(fields))


def put(fields: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """`fields` with the value at `a.b.c` replaced."""
    *parents, last = path.split(".")
    inner: Any = fields
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    inner[last] = value
    return fields


def test_what_is_written_reads_as_the_same_manifest(hollow: Draft) -> None:
    assert Manifest.model_validate_json(hollow.manifest.to_json()) == hollow.manifest


def test_the_text_is_stable_and_ends_in_one_newline(hollow: Draft) -> None:
    again = Manifest.model_validate_json(hollow.manifest.to_json()).to_json()
    assert again == hollow.manifest.to_json()
    assert again.endswith("}\n")


@pytest.mark.parametrize(
    "path",
    ["surprise", "graph.surprise", "audio.surprise", "keywords.surprise", "keywords.labels.0.surprise",
     "speaker.surprise", "speaker.calibration.surprise", "embedding.surprise", "lineage.surprise"],
)  # fmt: skip
def test_an_unknown_key_is_refused(hollow: Draft, path: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        read(put(hollow.fields(), path, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "path", ["keywords.labels.0.threshold", "speaker.threshold", "speaker.calibration.offset", "audio.longest_s"]
)
def test_a_number_that_is_not_finite_is_refused(hollow: Draft, path: str, value: float) -> None:
    with pytest.raises(ValidationError, match=path.replace("labels.0", r"labels\.0")):
        read(put(hollow.fields(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", "1"),
        ("version", 1.0),
        ("graph.opset", "17"),
        ("graph.parameters", True),
        ("keywords.labels.0.threshold", "0.5"),
        ("speaker.threshold", False),
        ("files", ["model.onnx"]),
        ("created_at", 1735787045),
    ],
)
def test_a_value_of_another_type_is_refused(hollow: Draft, path: str, value: object) -> None:
    with pytest.raises(ValidationError, match="valid"):
        read(put(hollow.fields(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 2),
        ("version", -1),
        ("licence", ""),
        ("graph.opset", 12),
        ("graph.opset", 31),
        ("audio.sample_rate_hz", 8000),
        ("audio.shortest_s", 0),
        ("keywords.labels", []),
        ("keywords.labels.0.threshold", 1.01),
        ("keywords.labels.0.threshold", -0.01),
        ("keywords.frame_hop_s", 0),
        ("speaker.dim", 0),
        ("speaker.calibration.scale", 0),
        ("speaker.cohort_top", 1),
    ],
)
def test_a_value_out_of_range_is_refused(hollow: Draft, path: str, value: object) -> None:
    with pytest.raises(ValidationError, match=path.replace(".", r"\.")):
        read(put(hollow.fields(), path, value))


def test_the_shortest_clip_must_be_shorter_than_the_longest(hollow: Draft) -> None:
    with pytest.raises(ValidationError, match="shortest_s must be below longest_s"):
        read(put(hollow.fields(), "audio.longest_s", 0.1))


def test_a_label_may_stand_only_once(hollow: Draft) -> None:
    fields = hollow.fields()
    fields["keywords"]["labels"] *= 2
    with pytest.raises(ValidationError, match="labels repeat"):
        read(fields)


@pytest.mark.parametrize(
    "label", ["en:computer", "zh:背景", "en:zoom in", "pt-BR:olá", "zh-Hant-TW:電腦", "yue:你", "en:x"]
)
def test_a_label_is_a_language_and_a_word(label: str) -> None:
    assert Keyword(label=label, threshold=0.5, typical_s=1).label == label


@pytest.mark.parametrize(
    "label",
    ["", "computer", ":computer", "en:", "en: computer", "en:computer ", "EN:computer", "english:computer", "e:x",
     "en-:x", "en:a\nb", "en:" + "x" * 65],
)  # fmt: skip
def test_other_labels_are_refused(label: str) -> None:
    with pytest.raises(ValidationError, match="label"):
        Keyword(label=label, threshold=0.5, typical_s=1)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "MODEL_CARD.md", "cohort.f32"])
def test_the_files_that_every_bundle_has_must_be_listed(hollow: Draft, name: str) -> None:
    fields = hollow.fields()
    del fields["files"][name]
    with pytest.raises(ValidationError, match=f"files does not list {name}"):
        read(fields)


def test_a_bundle_may_go_without_a_cohort(hollow: Draft) -> None:
    fields = put(hollow.fields(), "speaker.cohort_file", None)
    del fields["files"]["cohort.f32"]
    assert sorted(read(fields).files) == ["MODEL_CARD.md", "golden.npz", "model.onnx"]


def test_the_manifest_does_not_list_itself(hollow: Draft) -> None:
    fields = hollow.fields()
    fields["files"]["manifest.json"] = {"sha256": HASH, "size": 1}
    with pytest.raises(ValidationError, match=r"must not list manifest\.json"):
        read(fields)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", "-rf", "a b", "a\n", "a\x00", "ä", "x#y",
     "x" * 101],
)  # fmt: skip
@pytest.mark.parametrize("path", ["files", "graph.file", "golden_file", "speaker.cohort_file"])
def test_a_file_name_is_one_plain_path_component(hollow: Draft, path: str, name: str) -> None:
    fields = hollow.fields()
    fields["files"][name] = {"sha256": HASH, "size": 1}
    if path != "files":
        put(fields, path, name)
    with pytest.raises(ValidationError, match="pattern"):
        read(fields)


@pytest.mark.parametrize(
    "entry",
    [{"sha256": HASH[:-1], "size": 1}, {"sha256": HASH.upper(), "size": 1}, {"sha256": HASH, "size": -1},
     {"sha256": HASH, "size": 2**31 + 1}, {"sha256": HASH}],
)  # fmt: skip
def test_a_file_has_a_whole_hash_and_a_sane_size(hollow: Draft, entry: dict[str, Any]) -> None:
    fields = hollow.fields()
    fields["files"]["model.onnx"] = entry
    with pytest.raises(ValidationError, match=r"model\.onnx"):
        read(fields)
