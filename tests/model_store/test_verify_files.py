"""A bundle whose files are not exactly the published ones never reaches ONNX Runtime."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from model_store import Bundle, BundleError, verify_bundle
from model_store.files import LARGEST_MANIFEST_BYTES
from model_store.store import MANIFEST, open_bundle
from tests.model_store.bundles import FILES, Draft

pytestmark = pytest.mark.usefixtures("no_runtime")


def refused(folder: Path, reason: str) -> None:
    """Opened and checked from the start, as a service does it."""
    with pytest.raises(BundleError, match=reason):
        verify_bundle(open_bundle(folder))


@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first byte", "middle", "last byte"])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit(bundle: Bundle, name: str, place: float) -> None:
    path = bundle.path / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    refused(bundle.path, f"{name} is not the published file")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(bundle: Bundle, name: str) -> None:
    os.truncate(bundle.path / name, 7)
    refused(bundle.path, f"{name} is not the published file")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_grew(bundle: Bundle, name: str) -> None:
    with (bundle.path / name).open("ab") as stream:
        stream.write(b"\n")
    refused(bundle.path, f"{name} has .* bytes, allowed are")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    refused(bundle.path, f"{name}: No such file")


@pytest.mark.parametrize("name", ["weights.bin", ".hidden", "model.onnx.data"])
def test_a_file_that_is_not_listed(bundle: Bundle, name: str) -> None:
    (bundle.path / name).write_bytes(b"")
    refused(bundle.path, f"does not list: {name}")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_symbolic_link_even_to_the_right_bytes(bundle: Bundle, tmp_path: Path, name: str) -> None:
    (bundle.path / name).rename(tmp_path / "elsewhere")
    (bundle.path / name).symlink_to(tmp_path / "elsewhere")
    refused(bundle.path, "links are not followed")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_hard_link_even_to_the_right_bytes(bundle: Bundle, tmp_path: Path, name: str) -> None:
    os.link(bundle.path / name, tmp_path / "elsewhere")
    refused(bundle.path, f"{name} has 2 hard links")


def test_a_linked_folder(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    refused(tmp_path / "link", "link is a link")


def test_a_folder_linked_after_it_was_opened(bundle: Bundle, tmp_path: Path) -> None:
    bundle.path.rename(tmp_path / "moved")
    bundle.path.symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="is a link"):
        verify_bundle(bundle)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # Bound by a relative name: an absolute one may be longer than the 108 bytes a socket's name may have.
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            listener.bind(path.name)
        finally:
            os.chdir(before)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, _socket], ids=["fifo", "folder", "socket"])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_something_that_is_no_file(bundle: Bundle, name: str, make: Callable[[Path], None]) -> None:
    (bundle.path / name).unlink()
    make(bundle.path / name)
    refused(bundle.path, f"{name} is not a regular file|{name}: No such device")


def test_refusing_a_folder_leaves_no_open_file(bundle: Bundle) -> None:
    (bundle.path / "model.onnx").unlink()
    (bundle.path / "model.onnx").mkdir()
    refused(bundle.path, "not a regular file")
    before = os.listdir("/proc/self/fd")
    refused(bundle.path, "not a regular file")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_folder_without_a_manifest(bundle: Bundle) -> None:
    (bundle.path / MANIFEST).unlink()
    refused(bundle.path, "manifest.json: No such file")


def test_a_manifest_that_is_too_large(bundle: Bundle) -> None:
    with (bundle.path / MANIFEST).open("ab") as stream:
        stream.write(b" " * LARGEST_MANIFEST_BYTES)
    refused(bundle.path, f"allowed are {LARGEST_MANIFEST_BYTES}")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\x00" * 64, b"[" * 100_000, b'{"seed":' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut", "list", "null", "not UTF-8", "zeros", "deep", "huge number"],
)
def test_a_manifest_that_is_none(bundle: Bundle, text: bytes) -> None:
    (bundle.path / MANIFEST).write_bytes(text)
    refused(bundle.path, "manifest.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", ".hidden"])
def test_a_manifest_that_names_a_file_outside(bundle: Bundle, draft: Draft, name: str) -> None:
    fields = draft.fields()
    fields["files"][name] = {"sha256": "0" * 64, "size": 1}
    (bundle.path / MANIFEST).write_text(json.dumps(fields))
    refused(bundle.path, "pattern")


def test_a_bundle_gives_no_file_that_it_does_not_list(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"the manifest lists no '\.\./bundle/model\.onnx'"):
        bundle.read("../bundle/model.onnx")


def test_a_sound_bundle_gives_every_file_as_it_was_written(bundle: Bundle, draft: Draft) -> None:
    assert {name: bundle.read(name) for name in FILES} == dict(draft.files)
