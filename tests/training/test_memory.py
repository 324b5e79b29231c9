"""Memory that a training step frees stays the process's own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
import numpy as np
from training.memory import keep_freed_memory

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resident_mb()
block = np.ones(2**23)
held = resident_mb()
del block
print(held - before, resident_mb() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
@pytest.mark.parametrize(("way", "least_mb", "most_mb"), [("kept", 60, 140), ("as it is", -8, 8)])
def test_a_large_block_that_was_freed_is_kept(way: str, least_mb: float, most_mb: float) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
    held_mb, kept_mb = map(float, done.stdout.split())
    assert held_mb > 60
    assert least_mb < kept_mb < most_mb
