"""Versions: the store gives them, and they stay as they are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from model_store import BundleError, LocalStore, ModelNotFoundError, verify_bundle
from model_store.store import STALE_STAGING_S
from tests.model_store.bundles import FILES, Draft


def publish(store: LocalStore, draft: Draft, times: int = 1) -> list[int]:
    return [store.publish(draft.manifest, draft.files).manifest.version for _ in range(times)]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_store_counts_the_versions(store: LocalStore, hollow: Draft) -> None:
    assert publish(store, hollow, times=3) == [1, 2, 3]
    assert store.versions("tiny") == [1, 2, 3]


def test_each_model_has_its_own_count(store: LocalStore, hollow: Draft) -> None:
    assert publish(store, hollow, times=2) + publish(store, hollow.named("other")) == [1, 2, 1]
    assert store.names() == ["other", "tiny"]


def test_a_version_that_the_manifest_asks_for_is_not_given(store: LocalStore, hollow: Draft) -> None:
    asking = hollow.manifest.model_copy(update={"version": 41})
    assert store.publish(asking, hollow.files).manifest.version == 1


def test_after_the_tenth_comes_the_eleventh(store: LocalStore, hollow: Draft) -> None:
    assert publish(store, hollow, times=11)[-1] == 11
    assert store.resolve("tiny").manifest.version == 11


def test_a_gap_is_not_filled(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow, times=3)
    (store.root / "tiny" / "2").rename(store.root / "away")
    assert publish(store, hollow) == [4]


def test_what_is_published_is_what_was_handed_in(store: LocalStore, draft: Draft) -> None:
    published = store.publish(draft.manifest, draft.files)
    assert {name: published.read(name) for name in FILES} == dict(draft.files)
    assert published.manifest.model_copy(update={"version": 0}) == draft.manifest
    verify_bundle(published)


def test_a_store_holds_nothing_but_what_was_published(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow)
    expected = {"tiny", "tiny/1", "tiny/1/manifest.json", *(f"tiny/1/{name}" for name in FILES)}
    assert everything(store.root) == expected


def test_resolving_gives_the_digest_that_publishing_gave(store: LocalStore, hollow: Draft) -> None:
    published = store.publish(hollow.manifest, hollow.files)
    assert store.resolve("tiny@1") == published
    assert len(published.digest) == 64


def test_two_versions_have_two_digests(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow, times=2)
    assert store.resolve("tiny@1").digest != store.resolve("tiny@2").digest


@pytest.mark.parametrize("name", ["../x", "../../x", "a/b", ".hidden", "", "manifest.json"])
def test_a_file_that_must_not_be_there_is_refused_before_anything_is_written(
    store: LocalStore, hollow: Draft, tmp_path: Path, name: str
) -> None:
    with pytest.raises(BundleError, match="does not fit the files"):
        store.publish(hollow.manifest, {**hollow.files, name: b"x"})
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "Tiny", ".tiny"])
def test_a_name_that_is_a_path_is_refused_before_anything_is_written(
    store: LocalStore, hollow: Draft, tmp_path: Path, name: str
) -> None:
    with pytest.raises(BundleError, match="does not fit the files"):
        publish(store, hollow.named(name))
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_manifest_needs_must_be_handed_in(store: LocalStore, hollow: Draft, name: str) -> None:
    with pytest.raises(BundleError, match=f"files does not list {name}"):
        store.publish(hollow.manifest, {other: data for other, data in hollow.files.items() if other != name})


def test_an_empty_store_knows_no_model(store: LocalStore) -> None:
    assert (store.names(), store.versions("tiny"), store.aliases("tiny")) == ([], [], {})
    with pytest.raises(ModelNotFoundError, match="no model 'tiny'; there are: none"):
        store.resolve("tiny")


def test_an_unknown_model_is_answered_with_those_there_are(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow)
    publish(store, hollow.named("other"))
    with pytest.raises(ModelNotFoundError, match="no model 'tony'; there are: other, tiny"):
        store.resolve("tony")


def test_an_unknown_version_is_answered_with_those_there_are(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow, times=2)
    with pytest.raises(ModelNotFoundError, match="'tiny' has no version 3; there are: 1, 2"):
        store.resolve("tiny@3")


@pytest.mark.parametrize("name", ["..", ".", "tiny/1", "/", "TINY", "x" * 5000])
def test_a_name_that_is_a_path_has_no_versions(store: LocalStore, hollow: Draft, name: str) -> None:
    publish(store, hollow)
    assert (store.versions(name), store.aliases(name)) == ([], {})


def test_a_folder_that_holds_another_version_is_refused(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow)
    (store.root / "tiny" / "1").rename(store.root / "tiny" / "2")
    with pytest.raises(BundleError, match="2 holds tiny@1"):
        store.resolve("tiny@2")


def test_a_folder_that_holds_another_model_is_refused(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow)
    (store.root / "tiny").rename(store.root / "other")
    with pytest.raises(BundleError, match="1 holds tiny@1"):
        store.resolve("other")


def test_a_linked_version_is_refused(store: LocalStore, hollow: Draft) -> None:
    publish(store, hollow)
    (store.root / "tiny" / "2").symlink_to(store.root / "tiny" / "1")
    with pytest.raises(BundleError, match="is a link"):
        store.resolve("tiny@2")


@pytest.mark.parametrize("name", [".staging-1-aa", "0", "01", "1.bak", "-1", "٣", "aliases"])
def test_what_is_no_number_is_no_version(store: LocalStore, hollow: Draft, name: str) -> None:
    publish(store, hollow)
    (store.root / "tiny" / name).mkdir()
    assert store.versions("tiny") == [1]


@pytest.mark.parametrize(("age_s", "stays"), [(STALE_STAGING_S + 60, False), (STALE_STAGING_S - 60, True), (0, True)])
def test_staging_of_a_publisher_that_died_a_day_ago_goes(
    store: LocalStore, hollow: Draft, age_s: float, stays: bool
) -> None:
    left = store.root / "tiny" / ".staging-1-aa"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    then = time.time() - age_s
    os.utime(left, (then, then))
    publish(store, hollow)
    assert left.exists() is stays
    assert store.versions("tiny") == [1]


def test_staging_that_another_publisher_takes_away_meanwhile_is_no_fault(
    store: LocalStore, hollow: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda folder, _: iter([folder / ".staging-1-gone"]))
    assert publish(store, hollow) == [1]
