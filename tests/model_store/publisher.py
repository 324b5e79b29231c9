"""A publisher in a process of its own: `python -m tests.model_store.publisher STORE DRAFT COUNT STOP_AT`.

Says `ready`, waits for a line, then publishes the bundle in DRAFT COUNT times and says each version. At
the call of fsync with number STOP_AT (from 1; 0 means never) it says `stopped` and waits to be killed.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path

from model_store import LocalStore
from model_store.store import open_bundle


def main(root: Path, folder: Path, times: int, stop_at: int) -> None:
    draft = open_bundle(folder)
    files = {name: draft.read(name) for name in draft.manifest.files}
    fsync, calls = os.fsync, count(1)

    def stopping(descriptor: int) -> None:
        if next(calls) == stop_at:
            _say("stopped")
            sys.stdin.readline()
        fsync(descriptor)

    os.fsync = stopping
    _say("ready")
    sys.stdin.readline()
    for _ in range(times):
        _say(str(LocalStore(root).publish(draft.manifest, files).manifest.version))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
