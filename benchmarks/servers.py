"""The servers under measurement, each in processes of its own, one at a time."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from model_store import Bundle
from model_store.graph import part_of
from service.engine import PARTS
from training.evaluation.client import free_port

ROOT = Path(__file__).parents[1]
PEERS_ENVIRONMENT = ROOT / ".venv-bench" / "bin"
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """`detect` is the path of its keyword route; `body` turns a WAV file into what it takes."""

    port: int
    pid: int
    detect: str
    json_body: bool = False

    def body(self, file: bytes) -> bytes:
        return json.dumps({"audio": base64.b64encode(file).decode()}).encode() if self.json_body else file

    @property
    def content_type(self) -> str:
        return "application/json" if self.json_body else "audio/wav"

    @property
    def cpu_s(self) -> tuple[float, float]:
        """Seconds of a core used so far: by the main thread, in which the event loop runs, and by all others."""
        used = {}
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            # The name may hold spaces, and ends with the last bracket.
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            used[int(thread.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        own = used.pop(self.pid)
        return own, sum(used.values())

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def sotto(bundle: Bundle, *, profile: Path | None = None, **settings: str) -> Iterator[Server]:
    """`sotto serve` on the store that holds the bundle; settings without their prefix. With `profile`, cProfile
    follows its main thread and writes there once the service has been interrupted (SIGINT)."""
    port = free_port()
    with tempfile.TemporaryDirectory() as work:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SOTTO_")}
        environment |= {
            "SOTTO_PORT": str(port),
            "SOTTO_DATA_DIR": work,
            "SOTTO_MODELS_DIR": str(bundle.path.parents[1]),
            "SOTTO_MODEL": bundle.manifest.name,
            "SOTTO_LOG_LEVEL": "warning",
        }
        environment |= {f"SOTTO_{name.upper()}": value for name, value in settings.items()}
        followed = [sys.executable, "-m", "cProfile", "-o", str(profile)] if profile else []
        command = [*followed, str(Path(sys.executable).with_name("sotto")), "serve"]
        with _process(command, environment, f"http://127.0.0.1:{port}/readyz") as process:
            yield Server(port, process.pid, "/v1/keywords/detect")


# Name -> module under `benchmarks` and its settings. Several handlers of the naive kind, since which is the best
# depends on the machine.
PEERS: dict[str, tuple[str, dict[str, str]]] = {
    "FastAPI, async def, ORT defaults": ("peer_fastapi", {"PEER_KIND": "async", "PEER_THREADS": "0"}),
    "FastAPI, async def, 1 thread": ("peer_fastapi", {"PEER_KIND": "async", "PEER_THREADS": "1"}),
    "FastAPI, async def, 1 thread, a process a core": (
        "peer_fastapi",
        {"PEER_KIND": "async", "PEER_THREADS": "1", "WEB_CONCURRENCY": str(len(os.sched_getaffinity(0)))},
    ),
    "FastAPI, def (thread pool), 1 thread": ("peer_fastapi", {"PEER_KIND": "def", "PEER_THREADS": "1"}),
    "LitServe": ("peer_litserve", {}),
    "BentoML": ("peer_bentoml", {}),
}


def installed(name: str) -> bool:
    """Whether the peer's environment is there (`make bench-peers`); FastAPI is in our own."""
    return PEERS[name][0] == "peer_fastapi" or PEERS_ENVIRONMENT.is_dir()


@contextmanager
def peer(name: str, bundle: Bundle) -> Iterator[Server]:
    """One of PEERS around the part of the bundle's graph that finds keywords, as ours uses it."""
    module, settings = PEERS[name]
    port = free_port()
    with tempfile.TemporaryDirectory() as work:
        graph = Path(work, "keywords.onnx")
        graph.write_bytes(part_of(bundle.read(bundle.manifest.graph.file), PARTS["keywords"]))
        environment = {
            **os.environ,
            **settings,
            "ORT_DISABLE_TELEMETRY": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "PYTHONPATH": str(ROOT),
            "PEER_PORT": str(port),
            "PEER_GRAPH": str(graph),
            "PEER_LABELS": "|".join(keyword.label for keyword in bundle.manifest.keywords.labels),
        }
        commands = {
            "peer_fastapi": [
                sys.executable, "-m", "uvicorn", "benchmarks.peer_fastapi:app", "--port", str(port), "--no-access-log",
            ],
            "peer_litserve": [str(PEERS_ENVIRONMENT / "python"), "-m", "benchmarks.peer_litserve"],
            "peer_bentoml": [
                str(PEERS_ENVIRONMENT / "bentoml"), "serve", "benchmarks.peer_bentoml:Detector", "--port", str(port),
            ],
        }  # fmt: skip
        paths = {"peer_fastapi": "/docs", "peer_litserve": "/health", "peer_bentoml": "/readyz"}
        with _process(commands[module], environment, f"http://127.0.0.1:{port}{paths[module]}") as process:
            yield Server(port, process.pid, "/detect", json_body=module == "peer_litserve")


@contextmanager
def empty() -> Iterator[Server]:
    """The same server and event loop around an application that does nothing."""
    port = free_port()
    command = [
        sys.executable, "-m", "uvicorn", "benchmarks.peer_empty:app", "--port", str(port), "--no-access-log",
        "--lifespan", "off", "--http", "httptools", "--loop", "uvloop",
    ]  # fmt: skip
    with _process(command, dict(os.environ), f"http://127.0.0.1:{port}/") as process:
        yield Server(port, process.pid, "/")


@contextmanager
def _process(command: list[str], environment: dict[str, str], probe: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            end = time.monotonic() + READY_S
            while not _answers(probe):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.02)
            yield process
        finally:
            # Its workers too.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
