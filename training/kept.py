"""Rows of a comparison that were measured once and stay measured, whatever machine the rest is trained on.

A comparison takes longer than one machine may be had for. So each row's figures are written, as soon as it is
measured, into a folder that can be committed, with a digest of all that was decided: recipes, budget, the teacher's
weights, the data's tables, how it was measured. Where that is still the same, the row is not trained again. What
the code did is not in the digest: the revision is written down beside the figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from training.files import digest_json
from training.outcome import Measured, Shared, measured_of, shared_of

DECIDED = "decided"


class Kept:
    """One folder of them; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def row(self, name: str, decided: Any) -> Measured | None:
        """As it was measured under the same decisions, if it was."""
        found = self._read(name, decided)
        return None if found is None else measured_of(found)

    def keep_row(self, name: str, decided: Any, row: Measured) -> None:
        det = {curve: [[round(x, 5), round(y, 5)] for x, y in points] for curve, points in row.det.items()}
        self._write(name, decided, asdict(replace(row, det={})) | {"det": det})

    def shared(self, rows: Sequence[str], decided: Any) -> Shared | None:
        """What these rows share, if it was looked at under the same decisions."""
        found = self._read("+".join(rows), decided)
        return None if found is None else shared_of(found)

    def keep_shared(self, decided: Any, shared: Shared) -> None:
        self._write("+".join(shared.rows), decided, asdict(shared))

    def _read(self, name: str, decided: Any) -> dict[str, Any] | None:
        path = None if self._folder is None else self._folder / f"{name}.json"
        if path is None or not path.is_file():
            return None
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored if stored.pop(DECIDED) == digest_json(decided) else None

    def _write(self, name: str, decided: Any, content: dict[str, Any]) -> None:
        """A line for each entry, and for each figure, so that a difference can be read."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"{json.dumps(key)}: {_laid_out(value)}"
            for key, value in {DECIDED: digest_json(decided), **content}.items()
        ]
        partial = self._folder / f"{name}.partial"
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        partial.replace(self._folder / f"{name}.json")


def _laid_out(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)
