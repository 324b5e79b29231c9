"""What one writes first: a FastAPI handler around the graph. NAIVE_THREADS=0 leaves ONNX Runtime's defaults;
NAIVE_KIND chooses `async def` (inference on the event loop) or `def` (FastAPI's thread pool)."""

import io
import os

import numpy as np
import onnxruntime
import soundfile
from fastapi import FastAPI, Request

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("NAIVE_THREADS", "0"))
session = onnxruntime.InferenceSession(os.environ["NAIVE_GRAPH"], options, providers=["CPUExecutionProvider"])
labels = os.environ["NAIVE_LABELS"].split("|")
app = FastAPI()


def answer(body: bytes) -> dict:
    samples, _ = soundfile.read(io.BytesIO(body), dtype="float32")
    logits, *_ = session.run(None, {"waveform": samples[None], "lengths": np.array([len(samples)])})
    odds = np.exp(logits[0, :, 1:] - logits[0, :, :1]).sum(axis=0)
    scores = odds / (1 + odds.sum())
    top = np.argsort(-scores)[:5]
    return {"top": [{"keyword": labels[index], "score": float(scores[index])} for index in top]}


if os.environ.get("NAIVE_KIND", "async") == "async":

    @app.post("/detect")
    async def detect(request: Request) -> dict:
        return answer(await request.body())

else:
    from fastapi import Body

    @app.post("/detect")
    def detect_in_thread(body: bytes = Body(media_type="audio/wav")) -> dict:
        return answer(body)
