"""LitServe around the graph: one worker process a core, as its documentation has it for models on the CPU. Its
handlers take JSON or forms, so the file comes as base64."""

import base64
import os

import litserve

from benchmarks.spotting import Spotter


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002  LitServe's
        self.spotter = Spotter()

    def decode_request(self, request: dict) -> bytes:
        return base64.b64decode(request["audio"])

    def predict(self, file: bytes) -> dict:
        return self.spotter(file)

    def encode_response(self, output: dict) -> dict:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/detect"), accelerator="cpu", workers_per_device=len(os.sched_getaffinity(0))
    )
    server.run(port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="warning")
