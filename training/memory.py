"""What a step frees is kept for the next one."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1
_PAD_BYTES = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Take large blocks from the heap and never give it back; whether the C library can (glibc's can).

    By default each block beyond some size is the kernel's: it is asked for anew in every step, zeroed page by page as
    it is first written, and given back when freed. A step of `sotto-micro` takes a fifth more time by that.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None:
        return False
    return all([change(_MMAP_MAX, 0), change(_TRIM_THRESHOLD, _LARGEST), change(_TOP_PAD, _PAD_BYTES)])
