"""The golden clip: a waveform and the outputs that the graph gave for it when it was exported.

Stored as an uncompressed .npz without pickles. A service that cannot reproduce it is not running the
model that was measured.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from model_store.errors import BundleError
from model_store.graph import OUTPUTS

TOLERANCE = 1e-4

Array = npt.NDArray[np.float32]


def pack(waveform: Array, outputs: Mapping[str, Array]) -> bytes:
    """`waveform` [N] float32 and each output without its batch axis."""
    stream = io.BytesIO()
    np.savez(stream, waveform=waveform, **{name: outputs[name] for name in OUTPUTS})
    return stream.getvalue()


def unpack(data: bytes) -> tuple[Array, dict[str, Array]]:
    """Raises BundleError."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name], dtype=np.float32) for name in ("waveform", *OUTPUTS)}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise BundleError(f"the golden clip does not read: {error}") from error
    waveform = arrays.pop("waveform")
    return waveform, arrays


def compare(name: str, expected: Array, found: Array, *, tolerance: float = TOLERANCE) -> None:
    """Raises BundleError where shapes differ or any element is further off than `tolerance`."""
    if expected.shape != found.shape:
        raise BundleError(f"{name} has shape {found.shape}, expected {expected.shape}")
    worst = float(np.abs(expected - found).max(initial=0.0))
    if not worst <= tolerance:
        raise BundleError(f"{name} differs by {worst:.2e}, allowed are {tolerance:.0e}")
