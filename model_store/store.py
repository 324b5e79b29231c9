"""A directory of bundles.

    ROOT/NAME/3/manifest.json, model.onnx, ...     immutable once there
    ROOT/NAME/aliases/production                   a file that holds "3"

A version appears by one rename of a complete, synced folder, so a crash leaves either nothing or all
of it, and of two publishers one rename fails and takes the next number. Staging folders start with a
dot and are never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from model_store.errors import AliasError, BundleError, ModelNotFoundError
from model_store.files import LARGEST_MANIFEST_BYTES, describe, read_checked, read_plain, sync_folder, write_durably
from model_store.manifest import NAME_PATTERN, Manifest
from model_store.reference import DEFAULT_ALIAS, ModelReference, check_alias, is_alias

MANIFEST = "manifest.json"
STALE_STAGING_S = 24 * 3600
LONGEST_ALIAS_FILE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Bundle:
    """One published version: its folder, its manifest, and the manifest's SHA-256."""

    path: Path
    manifest: Manifest
    digest: str

    def read(self, name: str) -> bytes:
        """A listed file's bytes, checked against the manifest. Raises BundleError."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: the manifest lists no {name!r}")
        return read_checked(self.path, name, entry)


def builtin_store_path() -> Path:
    """The store that ships with the package."""
    return Path(__file__).parent / "builtin"


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest; its files are read, and checked, when asked for. Raises BundleError."""
    raw = read_plain(folder, MANIFEST, at_most=LARGEST_MANIFEST_BYTES)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise BundleError(f"{folder / MANIFEST}: {error}") from error
    return Bundle(folder, manifest, hashlib.sha256(raw).hexdigest())


class LocalStore:
    """The store in a local directory; safe for many readers and publishers at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """All models with at least one version."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if _is_name(entry.name) and self.versions(entry.name))

    def versions(self, name: str) -> list[int]:
        """Published versions, ascending; empty for an unknown name."""
        folder = self.root / name
        if not _is_name(name) or not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if _is_version(entry.name))

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version. Raises BundleError where an alias is no file that holds a version."""
        return {alias: self._alias_version(name, alias) for alias in self._alias_names(name)}

    def resolve(self, text: str) -> Bundle:
        """The bundle a reference names. A bare name means the alias `production`, or the newest version
        where that alias does not exist. Raises ModelNotFoundError, BundleError."""
        reference = ModelReference.parse(text)
        versions = self.versions(reference.name)
        if not versions:
            raise ModelNotFoundError(f"no model {reference.name!r}; there are: {', '.join(self.names()) or 'none'}")
        version = self._version(reference, versions)
        # Listed anew: the alias may have moved to a version published since.
        versions = self.versions(reference.name)
        if version not in versions:
            have = ", ".join(map(str, versions))
            raise ModelNotFoundError(f"{reference.name!r} has no version {version}; there are: {have}")
        bundle = open_bundle(self.root / reference.name / str(version))
        if (bundle.manifest.name, bundle.manifest.version) != (reference.name, version):
            raise BundleError(f"{bundle.path} holds {bundle.manifest.name}@{bundle.manifest.version}")
        return bundle

    def publish(self, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """Add a new version and return it; `manifest.files` and `.version` are filled in here.

        Raises BundleError where the manifest does not fit the files.
        """
        entries = {name: describe(data).model_dump() for name, data in sorted(files.items())}
        fields = {**manifest.model_dump(mode="json"), "files": entries}
        # Before anything is written: a name of a file or a model must not be a path.
        _numbered(fields, 1)
        home = self.root / manifest.name
        home.mkdir(parents=True, exist_ok=True)
        sync_folder(self.root)
        self._sweep(home)
        staging = home / f".staging-{os.getpid()}-{os.urandom(6).hex()}"
        staging.mkdir()
        try:
            for name, data in files.items():
                write_durably(staging / name, data)
            return self._claim(home, staging, fields)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point `alias` at a published version, in one step. Raises AliasError, ModelNotFoundError."""
        check_alias(alias)
        versions = self.versions(name)
        if not versions:
            raise ModelNotFoundError(f"no model {name!r}")
        if version not in versions:
            raise AliasError(f"{name!r} has no version {version}; there are: {', '.join(map(str, versions))}")
        folder = self.root / name / "aliases"
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
        write_durably(folder / alias, f"{version}\n".encode())

    def _claim(self, home: Path, staging: Path, fields: dict[str, object]) -> Bundle:
        """Give the staged folder the next free number by renaming it there."""
        while True:
            version = max(self.versions(home.name), default=0) + 1
            write_durably(staging / MANIFEST, _numbered(fields, version).to_json().encode())
            target = home / str(version)
            try:
                # Fails where the target exists and is not empty, which every version is.
                staging.rename(target)
            except OSError:
                if not target.exists():
                    raise
                continue
            sync_folder(home)
            return open_bundle(target)

    def _sweep(self, home: Path) -> None:
        """Remove what publishers that died long ago left behind."""
        for entry in home.glob(".staging-*"):
            # Another publisher's may be gone by now.
            with suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > STALE_STAGING_S:
                    shutil.rmtree(entry, ignore_errors=True)

    def _version(self, reference: ModelReference, versions: list[int]) -> int:
        if reference.version is not None:
            return reference.version
        # Only the alias that is asked for is read: a broken one must not stop the others.
        alias = reference.alias or DEFAULT_ALIAS
        aliases = self._alias_names(reference.name)
        if alias in aliases:
            return self._alias_version(reference.name, alias)
        if reference.alias is None:
            return versions[-1]
        have = ", ".join(aliases) or "none"
        raise ModelNotFoundError(f"{reference.name!r} has no alias {alias!r}; there are: {have}")

    def _alias_names(self, name: str) -> list[str]:
        folder = self.root / name / "aliases"
        if not _is_name(name) or not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if is_alias(entry.name))

    def _alias_version(self, name: str, alias: str) -> int:
        text = read_plain(self.root / name / "aliases", alias, at_most=LONGEST_ALIAS_FILE_BYTES)
        stripped = text.decode("ascii", "replace").strip()
        if not _is_version(stripped):
            raise BundleError(f"alias {name}@{alias} holds {stripped!r}, not a version")
        return int(stripped)


def _numbered(fields: dict[str, object], version: int) -> Manifest:
    try:
        return Manifest.model_validate_json(json.dumps({**fields, "version": version}))
    except ValidationError as error:
        raise BundleError(f"the manifest does not fit the files: {error}") from error


def _is_name(text: str) -> bool:
    return re.fullmatch(NAME_PATTERN, text) is not None


def _is_version(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,8}", text) is not None
