"""A service to measure: one that runs already, or a bundle served for the occasion."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from model_store import Bundle, LocalStore
from model_store.store import open_bundle
from training.errors import MeasurementError

T = TypeVar("T")
R = TypeVar("R")

START_TIMEOUT_S = 60.0
CONCURRENCY = 4
RETRIES = 5
# Shorter than servers keep an idle connection (uvicorn five seconds, as httpx does by itself): a request that goes out
# while its connection is being closed is lost, and hours of measuring with it.
KEEP_ALIVE_S = 2.0
# Their names stand in the address, which servers bound.
CANDIDATES = 100


@dataclass(frozen=True, slots=True)
class Upload:
    """One clip to send."""

    data: bytes
    content_type: str = "audio/ogg"


class ServiceClient:
    """Talks to one service; safe from several threads. `enrolled_by` names another model that enrols speakers."""

    def __init__(self, url: str, api_key: str | None = None, enrolled_by: str | None = None) -> None:
        self._enrolling = {} if enrolled_by is None else {"model": enrolled_by}
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.url = url.rstrip("/")
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_S)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=60.0, limits=limits)

    def close(self) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """Name and version that answer by default."""
        found: dict[str, Any] = self._json(self._http.get("/v1/models"))["default"]
        return found

    def tells_speakers(self) -> bool:
        """Whether the model that answers by default knows people by their voices."""
        return "speaker" in self._version()["tasks"]

    def operating_points(self) -> dict[float, float]:
        """Of the model that answers by default: false-accept rates and the thresholds that are to keep to them."""
        points = self._version().get("operating_points", ())
        return {point["false_accept_rate"]: point["threshold"] for point in points}

    def keywords(self) -> list[str]:
        """All labels."""
        return list(self.thresholds())

    def thresholds(self) -> dict[str, float]:
        """Of every label."""
        entries = self._json(self._http.get("/v1/keywords"))["keywords"]
        return {entry["keyword"]: entry["threshold"] for entry in entries}

    def detect(self, upload: Upload, **query: Any) -> dict[str, Any]:
        """The answer of /v1/keywords/detect."""
        return self._json(self._post("/v1/keywords/detect", upload, query))

    def enrol(self, speaker_id: str, uploads: Sequence[Upload]) -> dict[str, Any]:
        """The answer of enrollments, all clips in one request."""
        files = [("audio", (f"{index}", upload.data, upload.content_type)) for index, upload in enumerate(uploads)]
        return self._json(
            self._http.post(f"/v1/speakers/{speaker_id}/enrollments", files=files, params=self._enrolling)
        )

    def compare(self, upload: Upload, speaker_ids: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        """The clip's score against each of these profiles, or None where the service finds no speech in it."""
        found: dict[str, dict[str, Any]] = {}
        for first in range(0, len(speaker_ids), CANDIDATES):
            asked = list(speaker_ids[first : first + CANDIDATES])
            query = {"candidates": asked, "top_k": len(asked)}
            answer = self._heard(self._post("/v1/speakers/identify", upload, query))
            if answer is None:
                return None
            found |= {one["speaker_id"]: one for one in answer["candidates"]}
        return found

    def speaker_embedding(self, upload: Upload) -> list[float] | None:
        """The clip's, or None where the service finds no speech in it."""
        answer = self._heard(self._post("/v1/embeddings", upload, {"type": "speaker"}))
        return None if answer is None else answer["data"][0]["embedding"]

    def delete(self, speaker_id: str) -> None:
        """Remove the speaker; fine where there is none."""
        response = self._http.delete(f"/v1/speakers/{speaker_id}")
        if response.status_code != httpx.codes.NOT_FOUND:
            self._checked(response)

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Apply `work` to all items, a few at a time, results in order."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(work, items))

    def _version(self) -> dict[str, Any]:
        default = self.model()
        versions: list[dict[str, Any]] = self._json(self._http.get(f"/v1/models/{default['name']}"))["versions"]
        return next((one for one in versions if one["version"] == default["version"]), {})

    def _post(self, path: str, upload: Upload, query: dict[str, Any]) -> httpx.Response:
        for attempt in range(RETRIES):
            headers = {"Content-Type": upload.content_type}
            response = self._http.post(path, content=upload.data, headers=headers, params=query)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return response
            time.sleep(float(response.headers.get("Retry-After", 1)) * (attempt + 1))
        return response

    def _heard(self, response: httpx.Response) -> dict[str, Any] | None:
        if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY and response.json()["code"] == "no_speech":
            return None
        return self._json(response)

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        self._checked(response)
        body: dict[str, Any] = response.json()
        return body

    def _checked(self, response: httpx.Response) -> None:
        if not response.is_success:
            raise MeasurementError(f"{response.request.method} {response.request.url}: {response.text[:300]}")


@contextmanager
def served(bundle: Path, enrolled_by: Bundle | None = None) -> Iterator[ServiceClient]:
    """Serve the bundle in `bundle` (published, under its own number, or draft) from a store of its own, with empty
    profiles; with `enrolled_by`, that one too.

    Raises MeasurementError when the service does not come up.
    """
    work = Path(tempfile.mkdtemp(prefix="sotto-evaluate-"))
    try:
        found = open_bundle(bundle)
        store = LocalStore(work / "store")
        if enrolled_by is not None and not found.manifest.version * enrolled_by.manifest.version:
            raise MeasurementError(f"{bundle} or {enrolled_by.path} has not been published: profiles are of versions")
        model, other = _into(store, found), None if enrolled_by is None else _into(store, enrolled_by)
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SOTTO_")}
        environment |= {
            "SOTTO_PORT": str(port),
            "SOTTO_DATA_DIR": str(work / "data"),
            "SOTTO_MODELS_DIR": str(store.root),
            "SOTTO_MODEL": model,
            "SOTTO_LOG_LEVEL": "warning",
            "SOTTO_REQUEST_TIMEOUT_S": "60",
        }
        command = [str(Path(sys.executable).with_name("sotto")), "serve"]
        with (work / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            client = ServiceClient(f"http://127.0.0.1:{port}", enrolled_by=other)
            _wait_until_ready(client, process, work / "log")
            yield client
            client.close()
        finally:
            process.terminate()
            process.wait(30)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _into(store: LocalStore, bundle: Bundle) -> str:
    """What it is called there: a draft is the first version, and others are under their own numbers."""
    manifest = bundle.manifest
    if not manifest.version:
        manifest = store.publish(manifest, {name: bundle.read(name) for name in manifest.files}).manifest
    else:
        shutil.copytree(bundle.path, store.root / manifest.name / str(manifest.version), dirs_exist_ok=True)
    return f"{manifest.name}@{manifest.version}"


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(client: ServiceClient, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{client.url}/readyz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise MeasurementError(f"the service did not become ready:\n{log.read_text()[-2000:]}")
