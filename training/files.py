"""Files that a crash leaves as they were or as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(content: Any, path: Path) -> None:
    """Under another name first, then put in its place."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)
