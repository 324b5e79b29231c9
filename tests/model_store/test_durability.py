"""What must be on the disk before what, so that a power cut finds a sound store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_store import LocalStore
from tests.model_store.bundles import Draft

STAGING = "tiny/STAGING"


@pytest.fixture
def log(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each fsync and each rename with paths below the store's root, random parts replaced."""
    lines: list[str] = []

    def plain(path: str | Path) -> str:
        below = os.path.relpath(path, store.root)
        return re.sub(r"/\.(?!staging)(.+)\.\d+\.[0-9a-f]{8}$", r"/\1", re.sub(r"\.staging-\d+-\w+", "STAGING", below))

    def renaming(real: Callable[..., Any]) -> Callable[..., Any]:
        def rename(path: Path, target: Path) -> Path:
            lines.append(f"rename {plain(path)} {plain(target)}")
            return real(path, target)

        return rename

    monkeypatch.setattr(os, "fsync", lambda fd: lines.append(f"fsync {plain(os.readlink(f'/proc/self/fd/{fd}'))}"))
    monkeypatch.setattr(Path, "rename", renaming(Path.rename))
    monkeypatch.setattr(Path, "replace", renaming(Path.replace))
    return lines


def test_a_version_appears_when_all_of_it_is_on_the_disk(store: LocalStore, hollow: Draft, log: list[str]) -> None:
    store.publish(hollow.manifest, hollow.files)
    written = [
        line
        for name in (*hollow.files, "manifest.json")
        for line in (
            f"fsync {STAGING}/{name}",
            f"rename {STAGING}/{name} {STAGING}/{name}",
            f"fsync {STAGING}",
        )
    ]
    assert log == ["fsync .", *written, f"rename {STAGING} tiny/1", "fsync tiny"]


def test_an_alias_moves_when_its_new_version_is_on_the_disk(store: LocalStore, hollow: Draft, log: list[str]) -> None:
    store.publish(hollow.manifest, hollow.files)
    log.clear()
    store.set_alias("tiny", "production", 1)
    alias = "tiny/aliases/production"
    assert log == ["fsync tiny", f"fsync {alias}", f"rename {alias} {alias}", "fsync tiny/aliases"]
