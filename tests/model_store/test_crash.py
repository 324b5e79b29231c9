"""Every step of publishing and of moving an alias may be the last one, or fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_store import LocalStore, StoreError
from model_store.store import MANIFEST
from tests.model_store.bundles import FILES, Draft

# Every way in which the store changes what is on the disk, and fsync.
STEPS = [
    (os, "fsync"),
    (os, "open"),
    (Path, "mkdir"),
    (Path, "open"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (shutil, "rmtree"),
]


class PowerCut(BaseException):
    """Nothing runs after it, not even cleaning up."""


class Faults:
    """Makes step `fail_at` (from 1) raise; after a power cut every later step as well."""

    def __init__(self, fail_at: int, error: type[BaseException]) -> None:
        self._fail_at = fail_at
        self._error = error
        self.steps = 0

    @property
    def happened(self) -> bool:
        return self.steps >= self._fail_at

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            self.steps += 1
            if self.steps == self._fail_at or (self.happened and self._error is PowerCut):
                raise self._error(28, "No space left on device")
            return real(*args, **options)

        return step


def attempt(fail_at: int, error: type[BaseException], work: Callable[[], object]) -> Faults:
    """Do the work with its step `fail_at` failing."""
    faults = Faults(fail_at, error)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, faults.around(getattr(owner, name)))
        try:
            work()
        except (error, StoreError):
            assert faults.happened
    return faults


def is_whole(store: LocalStore, version: int) -> bool:
    bundle = store.resolve(f"tiny@{version}")
    return {entry.name for entry in bundle.path.iterdir()} == {*FILES, MANIFEST} and all(map(bundle.read, FILES))


@pytest.mark.parametrize("error", [PowerCut, OSError], ids=["power cut", "full disk"])
def test_publishing_that_ends_at_any_step_leaves_all_or_nothing(
    store: LocalStore, hollow: Draft, error: type[BaseException]
) -> None:
    def publish() -> int:
        return store.publish(hollow.manifest, hollow.files).manifest.version

    published = publish()
    fail_at, done = 0, False
    while not done:
        fail_at += 1
        done = not attempt(fail_at, error, publish).happened
        versions = store.versions("tiny")
        assert versions in (list(range(1, published + 1)), list(range(1, published + 2))), fail_at
        assert is_whole(store, versions[-1]), fail_at
        published = publish()
        assert published == len(versions) + 1, fail_at
    assert all(is_whole(store, version) for version in store.versions("tiny"))
    # At least: the staging folder, five files of four steps each, the rename, the folder's fsync.
    assert fail_at > 23


def test_a_full_disk_leaves_no_staging_behind(store: LocalStore, hollow: Draft) -> None:
    attempt(12, OSError, lambda: store.publish(hollow.manifest, hollow.files))
    assert list((store.root / "tiny").iterdir()) == []


def test_a_power_cut_leaves_staging_that_is_never_listed(store: LocalStore, hollow: Draft) -> None:
    attempt(12, PowerCut, lambda: store.publish(hollow.manifest, hollow.files))
    assert [entry.name.startswith(".staging-") for entry in (store.root / "tiny").iterdir()] == [True]
    assert (store.names(), store.versions("tiny")) == ([], [])


@pytest.mark.parametrize("error", [PowerCut, OSError], ids=["power cut", "full disk"])
def test_an_alias_whose_move_ends_at_any_step_is_old_or_new(
    store: LocalStore, hollow: Draft, error: type[BaseException]
) -> None:
    for _ in range(2):
        store.publish(hollow.manifest, hollow.files)
    fail_at, done = 0, False
    while not done:
        fail_at += 1
        store.set_alias("tiny", "production", 1)
        done = not attempt(fail_at, error, lambda: store.set_alias("tiny", "production", 2)).happened
        assert store.aliases("tiny")["production"] in (1, 2), fail_at
    assert store.aliases("tiny") == {"production": 2}
    assert fail_at > 5
