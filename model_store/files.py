"""Reading bundle files so that nothing outside the bundle can be reached through it.

ONNX Runtime follows hard links, and four years of fixes to its checks of paths show that checking
strings is not enough. So a file is opened without following links, must be a plain file with a single
name, is read once, and only those bytes, checked, go on.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from model_store.errors import BundleError
from model_store.manifest import FILE_PATTERN, FileEntry

LARGEST_MANIFEST_BYTES = 4 * 2**20


def read_plain(folder: Path, name: str, *, at_most: int) -> bytes:
    """The bytes of a regular file directly inside `folder`. Raises BundleError."""
    if not re.fullmatch(FILE_PATTERN, name):
        raise BundleError(f"{name[:120]!r} is not a plain file name")
    if folder.is_symlink():
        raise BundleError(f"{folder} is a link")
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror} (links are not followed)") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        # None at all: it was replaced after it was opened, as an alias may be; what is read is still whole.
        if status.st_nlink > 1:
            raise BundleError(f"{path} has {status.st_nlink} hard links; a bundle's file has one name")
        if status.st_size > at_most:
            raise BundleError(f"{path} has {status.st_size} bytes, allowed are {at_most}")
        data = stream.read(at_most + 1)
    if len(data) > at_most:
        raise BundleError(f"{path} grew past {at_most} bytes while being read")
    return data


def read_checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    """The bytes of a listed file, whose size and SHA-256 are the manifest's. Raises BundleError."""
    data = read_plain(folder, name, at_most=entry.size)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != entry.size or digest != entry.sha256:
        raise BundleError(f"{folder / name} is not the published file: sha256 {digest}, manifest says {entry.sha256}")
    return data


def describe(data: bytes) -> FileEntry:
    """The manifest entry for these bytes."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def write_durably(path: Path, data: bytes) -> None:
    """Write so that after return the bytes survive a power cut; replaces atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
