"""Fixtures shared by all tests: where recordings are, a clean environment, made audio, bundles, services."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from model_store import LocalStore, builtin_store_path

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
SAMPLE_RATE_HZ = 16_000

Samples = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SOTTO_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings; tests that need it skip, saying so, where it is not there."""
    if not (SHARED_DATA / "manifest.csv").is_file():
        pytest.skip(f"needs the recordings of {SHARED_DATA}")
    return SHARED_DATA


def voice(seconds: float, *, seed: int = 0, pitch_hz: float = 120.0, level: float = 0.1) -> Samples:
    """Harmonics that swell and pause like syllables: enough like speech for every gate of the service."""
    time_s = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    rng = np.random.default_rng(seed)
    phase = 2 * np.pi * np.cumsum(pitch_hz * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time_s))) / SAMPLE_RATE_HZ
    tone = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 15))
    envelope = np.maximum(0.0, np.sin(2 * np.pi * 2.0 * time_s))
    return (level * tone * envelope + 0.0005 * rng.standard_normal(len(time_s))).astype(np.float32)


def encoded(
    samples: npt.NDArray[np.float32], *, rate_hz: int = SAMPLE_RATE_HZ, container: str = "WAV", subtype: str = "PCM_16"
) -> bytes:
    """`samples` [N] or [N, channels] as a file's bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate_hz, format=container, subtype=subtype)
    return stream.getvalue()


def references(store: LocalStore) -> list[str]:
    """Every version of every model in it, NAME@VERSION."""
    return [f"{name}@{version}" for name in store.names() for version in store.versions(name)]


@pytest.fixture(scope="session")
def builtin_store() -> LocalStore:
    return LocalStore(builtin_store_path())


@dataclass
class RunningService:
    """A service in a process of its own, as a user runs it."""

    url: str
    process: subprocess.Popen[str]
    data_dir: Path
    log: Path

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(
        self, path: str, data: bytes | None = None, content_type: str = "audio/wav", **options: object
    ) -> httpx.Response:
        if data is not None:
            headers = {"Content-Type": content_type, **options.pop("headers", {})}
            options |= {"content": data, "headers": headers}
        return httpx.post(self.url + path, timeout=60, **options)


def start_service(work: Path, **settings: str) -> RunningService:
    """Start `sotto serve` on a free port with its data under `work`; settings without the prefix."""
    work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SOTTO_")}
    environment |= {"SOTTO_PORT": str(port), "SOTTO_DATA_DIR": str(work / "data")}
    environment |= {f"SOTTO_{name.upper()}": value for name, value in settings.items()}
    log = work / "service.log"
    with log.open("a") as stream:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sotto")), "serve"],
            env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True, cwd=work,
        )  # fmt: skip
    service = RunningService(f"http://127.0.0.1:{port}", process, work / "data", log)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            if service.get("/readyz").is_success:
                return service
        except httpx.TransportError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the service did not become ready:\n{log.read_text()}")


def stop_service(service: RunningService) -> int:
    """SIGTERM, and the exit status."""
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait(30)


# As which a service without keys is asked in its own process: it answers to this machine's names only.
LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One service for all tests that leave nothing behind."""
    running = start_service(tmp_path_factory.mktemp("service"))
    yield running
    stop_service(running)


@pytest.fixture
def started() -> Iterator[list[RunningService]]:
    """Services put here are killed at the end if they still run."""
    running: list[RunningService] = []
    yield running
    for one in running:
        one.process.kill()
        one.process.wait(60)
