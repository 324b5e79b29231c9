"""README's commands, run as they stand, against a service of the test's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, RunningService, start_service, stop_service

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = start_service(tmp_path_factory.mktemp("readme"))
    yield running
    stop_service(running)


def answers(service: RunningService, script: str) -> list[dict]:
    """The JSON that each curl line of a shell script prints."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    lines = script.replace("http://127.0.0.1:8000", service.url).replace("curl -s", "curl -sS -w '\\n'")
    done = subprocess.run(["bash", "-ec", lines], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line]


def test_the_examples_are_heard_right(fresh: RunningService) -> None:
    one, five = answers(fresh, BLOCKS[0])
    assert [event["keyword"] for event in one["detections"]] == ["en:computer"]
    heard = [event["keyword"] for event in five["detections"]]
    assert heard == ["en:computer", "en:alexa", "en:wildfire", "en:jarvis", "en:snowboy"]


def test_enrol_verify_and_identify(fresh: RunningService) -> None:
    enrolled, same, other, whose, listed = answers(fresh, BLOCKS[1])
    assert (enrolled["status"], enrolled["enrollments"]) == ("enrolled", 2)
    assert (same["accepted"], other["accepted"]) == (True, False)
    assert whose["identified"] == "ada"
    assert [speaker["speaker_id"] for speaker in listed["speakers"]] == ["ada"]


def test_embed_analyze_and_delete(fresh: RunningService) -> None:
    answers(fresh, BLOCKS[1])
    embedded, analyzed = answers(fresh, BLOCKS[2])
    assert embedded["dim"] == 192
    assert [event["keyword"] for event in analyzed["keywords"]["detections"]] == ["en:computer"]
    assert analyzed["keywords"]["detections"][0]["spoken_by_speaker"] is True
    assert fresh.get("/v1/speakers").json()["speakers"] == []


def test_the_stream_tells_the_words_in_order(fresh: RunningService) -> None:
    line = BLOCKS[3].strip().replace("ws://127.0.0.1:8000", fresh.url.replace("http", "ws"))
    python = REPOSITORY / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs the serving environment that `make serve` and `make test` set up")
    done = subprocess.run(
        ["bash", "-ec", line], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(message) for message in done.stdout.splitlines()]
    words = [message["keyword"] for message in said if message["type"] == "detection"]
    assert words == ["en:computer", "en:alexa", "en:wildfire", "en:jarvis", "en:snowboy"]
    assert [said[0]["type"], said[-1]["type"]] == ["ready", "end"]


def test_every_make_target_that_readme_names_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z]+)", README))
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_every_sotto_command_that_readme_names_exists() -> None:
    sotto = Path(shutil.which("sotto", path=str(REPOSITORY / ".venv-dev/bin")) or "sotto")
    named = set(re.findall(r"bin/sotto ((?:models |keys )?[a-z]+)", README))
    assert len(named) >= 8
    for command in sorted(named):
        done = subprocess.run([sotto, *command.split(), "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"sotto {command}: {done.stderr}"
