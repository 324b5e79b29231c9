"""What every peer does around the graph: the same decoding, one call, the same ranking. No import of ours, since the
peers live in an environment of their own."""

import io
import os
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile


class Spotter:
    """The graph at PEER_GRAPH, `threads` threads in a call (0: ONNX Runtime's default)."""

    def __init__(self, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        graph = Path(os.environ["PEER_GRAPH"]).read_bytes()
        if b"QuantizeLinear" not in graph:
            # As ours: weights that the file keeps in eight bits become float once.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._labels = os.environ["PEER_LABELS"].split("|")

    def __call__(self, file: bytes) -> dict:
        samples, _ = soundfile.read(io.BytesIO(file), dtype="float32")
        (logits,) = self._session.run(
            ["keyword_logits"], {"waveform": samples[None], "lengths": np.array([len(samples)])}
        )
        odds = np.exp(logits[0, :, 1:] - logits[0, :, :1]).sum(axis=0)
        scores = odds / (1 + odds.sum())
        top = np.argsort(-scores)[:5]
        return {"top": [{"keyword": self._labels[index], "score": float(scores[index])} for index in top]}
