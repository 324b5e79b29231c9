"""The process: how it starts, what it refuses, how it stops, and what it keeps when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model_store import LocalStore, builtin_store_path
from service.auth import hash_key
from tests.conftest import REPOSITORY, RunningService, encoded, start_service, stop_service, voice

SOTTO = str(Path(sys.executable).with_name("sotto"))
# Generous: it says when to give up, not how fast things are.
DEADLINE_S = 120.0
# A request whose body never comes.
UNFINISHED = (
    b"POST /v1/keywords/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\nContent-Length: 9\r\n\r\n"
)


def until(condition: Callable[[], bool]) -> bool:
    """Whether the condition came true before the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def serve(work: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`sotto serve` that is expected to end by itself."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SOTTO_")}
    environment |= {"SOTTO_PORT": "0", "SOTTO_DATA_DIR": str(work / "data")}
    environment |= {f"SOTTO_{name.upper()}": text for name, text in settings.items()}
    return subprocess.run(
        [SOTTO, "serve"], env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S, cwd=work
    )


def waiting_clips(service: RunningService) -> float:
    """Clips that wait for a graph call."""
    text = service.get("/metrics").text
    (depth,) = re.findall(r"^sotto_queue_depth ([\d.]+)", text, re.MULTILINE)
    return float(depth)


def ready(service: RunningService) -> bool:
    try:
        return service.get("/readyz").is_success
    except httpx.TransportError:
        return False


def test_a_stop_answers_every_request_in_flight(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, inference_threads="1", max_batch="1", request_timeout_s="120")
    started.append(service)
    clip = encoded(voice(30), container="FLAC")
    with ThreadPoolExecutor(8) as threads:
        posts = [threads.submit(service.post, "/v1/keywords/detect", clip) for _ in range(8)]
        assert until(lambda: waiting_clips(service) >= 3)
        status = stop_service(service)
        answers = [post.result() for post in posts]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert status == 0


def test_an_idle_service_stops_with_status_zero(tmp_path: Path, started: list[RunningService]) -> None:
    started.append(start_service(tmp_path))
    assert stop_service(started[0]) == 0


def test_unready_before_it_drains(tmp_path: Path, started: list[RunningService]) -> None:
    """Between SIGTERM and the end of the delay: not ready, and still serving."""
    service = start_service(tmp_path, shutdown_delay_s="300")
    started.append(service)
    service.process.send_signal(signal.SIGTERM)
    assert until(lambda: not ready(service))
    assert service.get("/readyz").json()["checks"]["accepting"] is False
    assert service.post("/v1/keywords/detect", encoded(voice(1.0))).status_code == 200
    assert re.search(r"^sotto_ready 0", service.get("/metrics").text, re.MULTILINE)


def test_a_second_signal_ends_it_at_once(tmp_path: Path, started: list[RunningService]) -> None:
    """The drain would wait for an unfinished request longer than this test waits for the process."""
    service = start_service(tmp_path, request_timeout_s="120", shutdown_grace_s="300")
    started.append(service)
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(UNFINISHED)
        service.process.send_signal(signal.SIGTERM)
        assert until(lambda: not ready(service))
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(60)


def test_the_open_network_needs_a_key(tmp_path: Path) -> None:
    done = serve(tmp_path, host="0.0.0.0")
    assert done.returncode != 0
    assert "sotto keys new" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_a_key_it_listens_to_the_open_network(tmp_path: Path, started: list[RunningService]) -> None:
    keys = json.dumps([{"name": "me", "sha256": hash_key("secret")}])
    service = start_service(tmp_path, host="0.0.0.0", api_keys=keys)
    started.append(service)
    assert service.get("/v1/keywords").status_code == 401
    assert service.get("/v1/keywords", headers={"X-API-Key": "secret"}).status_code == 200


def test_a_new_key_has_the_tenant_and_scopes_that_were_asked_for() -> None:
    asked = [SOTTO, "keys", "new", "--name", "o'brien", "--tenant", "shop", "--scope", "admin"]
    printed = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
    # As a shell reads it, where it is pasted.
    line = printed.splitlines()[1]
    read = subprocess.run(["sh", "-c", f'{line}; printf %s "$SOTTO_API_KEYS"'], capture_output=True, check=True).stdout
    (key,) = json.loads(read)
    assert (key["name"], key["tenant"], key["scopes"]) == ("o'brien", "shop", ["admin"])


@pytest.mark.parametrize("wrong", [("--scope", "admn"), ("--tenant", "a b"), ("--name", "")])
def test_a_key_that_the_service_would_refuse_is_not_made(wrong: tuple[str, str]) -> None:
    done = subprocess.run([SOTTO, "keys", "new", *wrong], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not done.stdout


def test_the_key_that_sotto_makes_is_accepted(tmp_path: Path, started: list[RunningService]) -> None:
    printed = subprocess.run([SOTTO, "keys", "new"], capture_output=True, text=True, check=True, timeout=60).stdout
    (secret,) = re.findall(r": (sotto_\S+)", printed)
    (configuration,) = re.findall(r"^SOTTO_API_KEYS='(.*)'$", printed, re.MULTILINE)
    assert secret not in configuration
    service = start_service(tmp_path, api_keys=configuration)
    started.append(service)
    assert service.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"prot": "8000"}, "SOTTO_PROT"), ({"port": "high"}, "SOTTO_PORT"), ({"port": "70000"}, "SOTTO_PORT"),
     ({"api_keys": '[{"name": "x", "sha256": "short"}]'}, "SOTTO_API_KEYS"), ({"prior": "1"}, "SOTTO_PRIOR")],
)  # fmt: skip
def test_a_setting_that_is_wrong_is_named(tmp_path: Path, settings: dict[str, str], named: str) -> None:
    done = serve(tmp_path, **settings)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert named in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve(tmp_path, port=str(taken.getsockname()[1]))
    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert "listens on" not in done.stdout


@pytest.mark.parametrize("damage", ["no-store", "no-model", "broken-graph", "broken-manifest"])
def test_a_store_that_cannot_be_used(tmp_path: Path, damage: str) -> None:
    shipped = LocalStore(builtin_store_path()).resolve("sotto-edge").path
    version = tmp_path / "store" / "sotto-edge" / shipped.name
    if damage != "no-store":
        version.mkdir(parents=True)
    if damage.startswith("broken"):
        for file in shipped.iterdir():
            (version / file.name).write_bytes(file.read_bytes())
        (version.parent / "aliases").mkdir()
        (version.parent / "aliases" / "production").write_text(shipped.name)
        broken = version / ("model.onnx" if damage == "broken-graph" else "manifest.json")
        broken.write_bytes(broken.read_bytes()[:-100])
    done = serve(tmp_path, models_dir=str(tmp_path / "store"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (said,) = re.findall(r"^error: (.*)", done.stderr, re.MULTILINE)
    assert {"no-store": "sotto-edge", "no-model": "sotto-edge", "broken-graph": "model.onnx"}.get(
        damage, "manifest.json"
    ) in said


def test_a_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file is in the way")
    done = serve(tmp_path)
    assert done.returncode != 0
    assert "error: " in done.stderr.strip().splitlines()[-1]


def test_what_it_prints_works_as_it_stands(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path)
    started.append(service)
    assert until(lambda: "curl" in service.log.read_text())
    printed = service.log.read_text()
    assert f"listens on {service.url}" in printed
    lines = [line.strip() for line in printed.splitlines() if line.strip().startswith("curl ")]
    assert len(lines) == 2
    found = []
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=REPOSITORY, capture_output=True, check=True, timeout=60)
        found.append([detection["keyword"] for detection in json.loads(done.stdout)["detections"]])
    assert found[0] == ["en:computer"]
    assert len(found[1]) >= 4


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, started: list[RunningService]) -> None:
    first = start_service(tmp_path)
    started.append(first)
    answer = first.post("/v1/speakers/ada/enrollments", encoded(voice(6)))
    first.process.kill()
    first.process.wait(DEADLINE_S)
    assert answer.json()["status"] == "enrolled"
    second = start_service(tmp_path)
    started.append(second)
    kept = second.get("/v1/speakers/ada")
    assert kept.status_code == 200
    assert (kept.json()["enrollments"], kept.json()["speech_s"]) == (1, answer.json()["speech_s"])
    assert second.post("/v1/speakers/ada/verify", encoded(voice(3, seed=4))).json()["accepted"] is True


def test_a_body_that_never_comes_is_given_up(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, request_timeout_s="0.5")
    started.append(service)
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as slow:
        slow.sendall(UNFINISHED)
        assert slow.recv(4096).startswith(b"HTTP/1.1 504")


def test_nothing_of_a_voice_is_logged(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, log_level="debug")
    started.append(service)
    service.post("/v1/speakers/hopper-9/enrollments", encoded(voice(6)))
    service.post("/v1/speakers/hopper-9/verify", encoded(voice(3)))
    numbers = service.post("/v1/embeddings", encoded(voice(3))).json()["data"][0]["embedding"]
    log = service.log.read_text()
    assert "hopper-9" not in log
    assert not any(f"{number:.6f}" in log for number in numbers if abs(number) > 1e-3)
