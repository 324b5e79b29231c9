"""The only door to ONNX Runtime.

Left to its defaults it takes every core of the host, spins on them between calls, and from 1.29 on its
official builds report usage to their maker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime


class Session(Protocol):
    """What is used of an InferenceSession; its own class carries no types."""

    def run(
        self, outputs: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[np.generic]]
    ) -> list[npt.NDArray[np.float32]]: ...


Provider = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def is_available(provider: Provider) -> bool:
    """Whether the installed ONNX Runtime can compute there."""
    return _PROVIDERS[provider] in onnxruntime.get_available_providers()


def computes_in_eight_bits(graph: bytes) -> bool:
    """Whether activations are rounded too (training/quantise.py): DequantizeLinear alone is for weights."""
    return b"QuantizeLinear" in graph


def session_options(graph: bytes, threads: int) -> onnxruntime.SessionOptions:
    """`threads` threads inside one call, none of them spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not computes_in_eight_bits(graph):
        # Weights that a file keeps in eight bits (training/compact.py) become float as it is loaded, not in every call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return options


def open_session(graph: bytes, *, threads: int, provider: Provider = "cpu") -> Session:
    """A session on the graph. Raises ONNX Runtime's own exceptions, which share no base class."""
    options = session_options(graph, threads)
    return cast(Session, onnxruntime.InferenceSession(graph, options, providers=[_PROVIDERS[provider]]))
