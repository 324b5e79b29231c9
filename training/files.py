"""Files told apart by what is in them, and left by a crash as they were or as they should be."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(content: Any, path: Path) -> None:
    """Under another name first, then put in its place."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def cache_key(paths: Iterable[Path]) -> str:
    """Of these files as they are now, in this order: a copy in the same place is the same, whatever its dates."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:20]


def digest_json(content: Any) -> str:
    """Of what the content says, in whatever order its keys stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait. A process that dies lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds it now."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
