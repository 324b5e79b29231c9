"""Which code trained something."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def git_revision() -> str:
    """HEAD of the code's repository when this process first asked, with `+changes` where files of training differ from
    it; "unknown" without git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head
