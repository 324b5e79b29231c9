"""Publishers in processes of their own: many at once, and killed half-way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import pytest

from model_store import LocalStore, verify_bundle
from tests.conftest import REPOSITORY
from tests.model_store.bundles import FILES, Draft

PUBLISHERS = 4
TIMES = 5
# What publishing asks fsync for: the root of the store; each file and its folder; the manifest and its
# folder; then, after the rename, the model's folder.
MANIFEST_FSYNC = 1 + 2 * len(FILES) + 1
LAST_FSYNC = MANIFEST_FSYNC + 2


@contextmanager
def publisher(store: LocalStore, folder: Path, *, times: int, stop_at: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that has loaded its draft and waits for a line."""
    command = [sys.executable, "-m", "tests.model_store.publisher", store.root, folder, str(times), str(stop_at)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    with process:
        try:
            assert said(process) == "ready"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_publishers_at_once_never_get_one_version(store: LocalStore, draft: Draft, tmp_path: Path) -> None:
    draft.write(tmp_path / "draft")
    with ExitStack() as stack:
        processes = [stack.enter_context(publisher(store, tmp_path / "draft", times=TIMES)) for _ in range(PUBLISHERS)]
        for process in processes:
            go(process)
        given = [[int(said(process)) for _ in range(TIMES)] for process in processes]
        assert [process.wait(60) for process in processes] == [0] * PUBLISHERS
    assert sorted(chain.from_iterable(given)) == list(range(1, PUBLISHERS * TIMES + 1))
    assert all(own == sorted(own) for own in given)
    for version in store.versions("tiny"):
        verify_bundle(store.resolve(f"tiny@{version}"))


@pytest.mark.parametrize(
    ("stop_at", "versions"),
    [(2, []), (MANIFEST_FSYNC, []), (MANIFEST_FSYNC + 1, []), (LAST_FSYNC, [1])],
    ids=["first file", "manifest", "before the rename", "after the rename"],
)
def test_a_killed_publisher_leaves_all_or_nothing(
    store: LocalStore, draft: Draft, tmp_path: Path, stop_at: int, versions: list[int]
) -> None:
    draft.write(tmp_path / "draft")
    with publisher(store, tmp_path / "draft", times=1, stop_at=stop_at) as process:
        go(process)
        assert said(process) == "stopped"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert store.versions("tiny") == versions
    for version in versions:
        verify_bundle(store.resolve(f"tiny@{version}"))
    assert store.publish(draft.manifest, draft.files).manifest.version == len(versions) + 1
