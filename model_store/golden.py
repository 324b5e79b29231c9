"""The golden clip: a waveform and the outputs that the graph gave for it when it was exported.

Stored as an uncompressed .npz without pickles. A service that cannot reproduce it is not running the
model that was measured.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model_store.errors import BundleError
from model_store.graph import OUTPUTS

TOLERANCE = 1e-4
# Of a graph that rounds, what a difference may come to, root mean square over standard deviation: where a value lies
# between two levels, the last bit of a float, which is not the same on every processor, decides which one it gets.
ROUNDED = 0.15

Array = npt.NDArray[np.float32]


def pack(waveform: Array, outputs: Mapping[str, Array]) -> bytes:
    """`waveform` [N] float32 and each output that there is, without its batch axis."""
    stream = io.BytesIO()
    arrays: dict[str, Any] = {"waveform": waveform, **{name: outputs[name] for name in OUTPUTS if name in outputs}}
    np.savez(stream, **arrays)
    return stream.getvalue()


def unpack(data: bytes, names: Sequence[str] = tuple(OUTPUTS)) -> tuple[Array, dict[str, Array]]:
    """The waveform and the outputs of these names. Raises BundleError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
            arrays = {name: np.asarray(loaded[name], dtype=np.float32) for name in ("waveform", *names)}
        waveform = arrays.pop("waveform")
        if waveform.ndim != 1 or waveform.size == 0:
            raise ValueError(f"the waveform has shape {waveform.shape}")
    except Exception as error:
        # Bytes made to confuse them get a dozen kinds of exception out of zipfile and numpy.
        raise BundleError(f"the golden clip does not read: {error}") from error
    return waveform, arrays


def compare(name: str, expected: Array, found: Array, *, tolerance: float = TOLERANCE) -> None:
    """Raises BundleError where shapes differ or any element is further off than `tolerance`."""
    if expected.shape != found.shape:
        raise BundleError(f"{name} has shape {found.shape}, expected {expected.shape}")
    worst = float(np.abs(expected - found).max(initial=0.0))
    if not worst <= tolerance:
        raise BundleError(f"{name} differs by {worst:.2e}, allowed are {tolerance:.0e}")


def resemble(name: str, expected: Array, found: Array) -> None:
    """Raises BundleError where shapes differ or the difference is more than rounding makes it."""
    if expected.shape != found.shape:
        raise BundleError(f"{name} has shape {found.shape}, expected {expected.shape}")
    share = float(np.sqrt(np.mean(np.square(expected - found)) / np.var(expected)))
    if not share <= ROUNDED:
        raise BundleError(f"{name} differs by {share:.2f} of its spread, allowed are {ROUNDED}")
