"""`sotto models ...` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from model_store import Bundle, LocalStore
from model_store.cli import app
from tests.model_store.bundles import Draft, draft_of
from tests.model_store.graphs import graph


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def two(store: LocalStore, draft: Draft) -> LocalStore:
    """A store with versions 1 and 2 of `tiny`, of which 1 is in production."""
    for _ in range(2):
        store.publish(draft.manifest, draft.files)
    store.set_alias("tiny", "production", 1)
    return store


def models(store: LocalStore, *words: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, words), "--store", str(store.root)])


def refused(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_list_shows_versions_and_aliases(two: LocalStore) -> None:
    result = models(two, "list")
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "tiny" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["tiny", "1, 2", "production -> 1"]


def test_list_of_a_store_that_is_not_there_is_empty(store: LocalStore) -> None:
    result = models(store, "list")
    assert result.exit_code == 0
    assert "tiny" not in result.stdout


def test_list_says_which_alias_is_broken(two: LocalStore) -> None:
    (two.root / "tiny" / "aliases" / "canary").write_text("newest")
    refused(models(two, "list"), "alias tiny@canary holds 'newest', not a version")


@pytest.mark.parametrize(("reference", "version"), [("tiny", 1), ("tiny@production", 1), ("tiny@2", 2)])
def test_show_prints_the_manifest_and_its_digest(two: LocalStore, reference: str, version: int) -> None:
    result = models(two, "show", reference)
    shown = json.loads(result.stdout)
    bundle = two.resolve(f"tiny@{version}")
    assert result.exit_code == 0
    assert shown == {"digest": bundle.digest, **bundle.manifest.model_dump(mode="json")}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("tony", "no model 'tony'; there are: tiny"),
        ("tiny@3", "'tiny' has no version 3; there are: 1, 2"),
        ("tiny@best", "'tiny' has no alias 'best'; there are: production"),
        ("../tiny", "names no model"),
    ],
)
@pytest.mark.parametrize("command", ["show", "verify"])
def test_an_unknown_model_is_exit_status_1(two: LocalStore, command: str, reference: str, message: str) -> None:
    refused(models(two, command, reference), message)


def test_publish_prints_the_version(two: LocalStore, bundle: Bundle) -> None:
    result = models(two, "publish", bundle.path)
    assert (result.exit_code, result.stdout) == (0, "tiny@3\n")
    assert two.versions("tiny") == [1, 2, 3]


def test_publish_leaves_aliases_alone_unless_told(two: LocalStore, bundle: Bundle) -> None:
    models(two, "publish", bundle.path)
    assert two.aliases("tiny") == {"production": 1}


def test_publish_points_an_alias_at_the_new_version(two: LocalStore, bundle: Bundle) -> None:
    result = models(two, "publish", bundle.path, "--alias", "production")
    assert (result.exit_code, result.stdout) == (0, "tiny@3\n")
    assert two.aliases("tiny") == {"production": 3}


def test_publish_of_an_altered_draft_adds_no_version(store: LocalStore, bundle: Bundle) -> None:
    (bundle.path / "model.onnx").write_bytes(b"altered")
    refused(models(store, "publish", bundle.path), "model.onnx is not the published file")
    assert store.names() == []


def test_publish_of_a_draft_that_does_not_verify_adds_no_version(
    store: LocalStore, draft: Draft, tmp_path: Path
) -> None:
    draft.changed("embedding", dim=16).write(tmp_path / "wrong")
    refused(models(store, "publish", tmp_path / "wrong"), "embedding has 8 values, the manifest says 16")
    assert store.names() == []


def test_publish_with_a_bad_alias_adds_no_version(store: LocalStore, bundle: Bundle) -> None:
    refused(models(store, "publish", bundle.path, "--alias", "Production"), "must be lower-case")
    assert store.names() == []


def test_publish_into_the_space_of_a_version_with_the_same_embeddings(two: LocalStore, bundle: Bundle) -> None:
    assert models(two, "publish", bundle.path, "--space", "tiny@2").stdout == "tiny@3\n"
    # Whose profiles those are stays the same however often it is done again.
    assert models(two, "publish", bundle.path, "--space", "tiny@3").stdout == "tiny@4\n"
    assert [two.resolve(f"tiny@{version}").manifest.speaker_space for version in (1, 2, 3, 4)] == [
        "tiny@1", "tiny@2", "tiny@2", "tiny@2"
    ]  # fmt: skip


def test_publish_into_the_space_of_another_network_adds_no_version(two: LocalStore, tmp_path: Path) -> None:
    other = draft_of(graph(seed=4).SerializeToString()).write(tmp_path / "other")
    refused(models(two, "publish", other.path, "--space", "tiny"), "its speaker embeddings are not those of tiny@1")
    refused(models(two, "publish", other.path, "--space", "tiny@9"), "'tiny' has no version 9")
    assert two.versions("tiny") == [1, 2]


def test_publish_of_a_folder_without_a_bundle(store: LocalStore, tmp_path: Path) -> None:
    refused(models(store, "publish", tmp_path), "manifest.json: No such file")


def test_alias_moves_production_in_one_command(two: LocalStore) -> None:
    result = models(two, "alias", "tiny", "production", "2")
    assert (result.exit_code, result.stdout) == (0, "tiny@production -> 2\n")
    assert two.resolve("tiny").manifest.version == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny", "production", "3"), "'tiny' has no version 3; there are: 1, 2"),
        (("tony", "production", "1"), "no model 'tony'"),
        (("tiny", "../x", "1"), "must be lower-case"),
    ],
)
def test_alias_that_cannot_be_is_exit_status_1(two: LocalStore, words: tuple[str, ...], message: str) -> None:
    refused(models(two, "alias", *words), message)


def test_alias_needs_a_number(two: LocalStore) -> None:
    assert models(two, "alias", "tiny", "production", "newest").exit_code == 2


def test_verify_of_a_sound_version(two: LocalStore) -> None:
    result = models(two, "verify", "tiny@2")
    assert (result.exit_code, result.stdout) == (0, f"tiny@2 is sound: {two.resolve('tiny@2').digest}\n")


def test_verify_of_a_draft_folder(store: LocalStore, bundle: Bundle) -> None:
    result = models(store, "verify", bundle.path)
    assert (result.exit_code, result.stdout) == (0, f"tiny@0 is sound: {bundle.digest}\n")


def test_verify_of_an_altered_version_is_exit_status_1(two: LocalStore) -> None:
    (two.root / "tiny" / "2" / "golden.npz").write_bytes(b"altered")
    refused(models(two, "verify", "tiny@2"), "golden.npz is not the published file")


def test_verify_of_a_very_long_name_is_exit_status_1(two: LocalStore) -> None:
    refused(models(two, "verify", "x" * 5000), "names no model")


def test_the_store_may_come_from_the_environment(two: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOTTO_MODELS_DIR", str(two.root))
    result = CliRunner().invoke(app, ["verify", "tiny"])
    assert result.stdout.startswith("tiny@1 is sound: ")
