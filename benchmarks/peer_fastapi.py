"""What one writes first: a FastAPI handler around the graph. PEER_THREADS=0 leaves ONNX Runtime's defaults;
PEER_KIND chooses `async def` (inference on the event loop) or `def` (FastAPI's thread pool)."""

import os

from fastapi import Body, FastAPI, Request

from benchmarks.spotting import Spotter

spotter = Spotter(int(os.environ["PEER_THREADS"]))
app = FastAPI()

if os.environ["PEER_KIND"] == "async":

    @app.post("/detect")
    async def detect(request: Request) -> dict:
        return spotter(await request.body())

else:

    @app.post("/detect")
    def detect_in_thread(body: bytes = Body(media_type="audio/wav")) -> dict:
        return spotter(body)
