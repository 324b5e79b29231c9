"""The golden clip's file, sound and made to confuse."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from model_store import BundleError
from model_store.golden import compare, pack, unpack

CLIP = np.linspace(-1, 1, 64, dtype=np.float32)
OUTPUTS = {
    "keyword_logits": np.ones((2, 4), np.float32),
    "speaker_embedding": np.ones(8, np.float32),
    "embedding": np.ones(8, np.float32),
    "frames": np.ones((2, 8), np.float32),
}


def archive(waveform: object, *, save: Callable[..., None] = np.savez) -> bytes:
    stream = io.BytesIO()
    save(stream, waveform=waveform, **OUTPUTS)
    return stream.getvalue()


def lone_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, CLIP)
    return stream.getvalue()


def archive_without(name: str) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{key: value for key, value in {"waveform": CLIP, **OUTPUTS}.items() if key != name})
    return stream.getvalue()


def lying_header() -> bytes:
    """Claims 2**50 samples and holds none."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    stream = io.BytesIO(archive_without("waveform"))
    with zipfile.ZipFile(stream, "a") as target:
        target.writestr("waveform.npy", header.getvalue())
    return stream.getvalue()


def test_what_is_packed_unpacks() -> None:
    waveform, outputs = unpack(pack(CLIP, OUTPUTS))
    assert np.array_equal(waveform, CLIP)
    assert {name: value.shape for name, value in outputs.items()} == {
        "keyword_logits": (2, 4), "speaker_embedding": (8,), "embedding": (8,), "frames": (2, 8)
    }  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"PK\x03\x04", id="only the magic"),
        pytest.param(np.random.default_rng(1).bytes(5000), id="random"),
        pytest.param(pack(CLIP, OUTPUTS)[:-40], id="truncated"),
        pytest.param(lone_array(), id="an array, no archive"),
        pytest.param(archive_without("waveform"), id="no waveform"),
        pytest.param(archive_without("frames"), id="an output is missing"),
        pytest.param(archive(np.array([{"a": 1}], dtype=object)), id="a pickle"),
        pytest.param(archive(np.array(["sound"])), id="text"),
        pytest.param(archive(CLIP[None]), id="two axes"),
        pytest.param(archive(np.float32(1)), id="no axis"),
        pytest.param(archive(CLIP[:0]), id="no samples"),
        pytest.param(archive(np.zeros(10**6, np.float32), save=np.savez_compressed), id="compressed, could be a bomb"),
        pytest.param(lying_header(), id="claims more than there is"),
    ],
)
def test_a_file_that_is_no_golden_clip_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="golden clip does not read"):
        unpack(data)


@pytest.mark.parametrize("error", [0.0, 0.9e-4, -0.9e-4])
def test_a_difference_within_the_tolerance_passes(error: float) -> None:
    compare("x", np.zeros(3, np.float32), np.array([0, error, 0], np.float32))


@pytest.mark.parametrize("error", [1.1e-4, -1.1e-4, 1.0, float("nan"), float("inf")])
def test_a_difference_past_the_tolerance_is_refused(error: float) -> None:
    with pytest.raises(BundleError, match="x differs by"):
        compare("x", np.zeros(3, np.float32), np.array([0, error, 0], np.float32))


def test_another_shape_is_refused() -> None:
    with pytest.raises(BundleError, match=r"x has shape \(3, 1\), expected \(3,\)"):
        compare("x", np.zeros(3, np.float32), np.zeros((3, 1), np.float32))
