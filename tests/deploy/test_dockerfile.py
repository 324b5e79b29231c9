"""The image's recipe, as far as it can be held to its word without a container engine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.settings import PREFIX, Settings
from tests.conftest import REPOSITORY, RunningService

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
# Extras that serving has a use for.
SERVING_EXTRAS = {"postgres"}


@dataclass(frozen=True)
class Instruction:
    stage: int
    name: str
    rest: str


def parse(text: str) -> list[Instruction]:
    """Comments dropped, continued lines joined, stages counted from 0."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found: list[Instruction] = []
    stage = -1
    for line in lines.replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name:
            stage += name == "FROM"
            found.append(Instruction(stage, name, " ".join(rest.split())))
    return found


INSTRUCTIONS = parse((REPOSITORY / "Dockerfile").read_text())
LAST_STAGE = INSTRUCTIONS[-1].stage
FINAL = [each for each in INSTRUCTIONS if each.stage == LAST_STAGE]


def final(name: str) -> str:
    """What the image ends up with for an instruction that is given once."""
    (only,) = (each.rest for each in FINAL if each.name == name)
    return only


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in final("ENV").split())


def wheel_sources() -> set[str]:
    """Top-level paths that a wheel is built from."""
    project = PROJECT["project"]
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    return {"pyproject.toml", project["readme"], *project["license-files"], *packages}


def test_it_is_built_in_two_stages() -> None:
    assert LAST_STAGE == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_every_stage_is_the_same_slim_python(stage: int) -> None:
    """A virtual environment works only beside the interpreter it was made with."""
    (base,) = (each.rest.split()[0] for each in INSTRUCTIONS if each.name == "FROM" and each.stage == stage)
    assert base == "python:3.12-slim"


def test_it_runs_as_the_user_of_the_manifests() -> None:
    assert final("USER") == "10001:10001"


def test_nothing_is_run_as_root_after_the_user_is_set() -> None:
    names = [each.name for each in FINAL]
    assert "RUN" not in names[names.index("USER") :]


def test_only_serving_extras_are_installed() -> None:
    (install,) = (
        each.rest for each in INSTRUCTIONS if each.name == "RUN" and " install " in each.rest and "pip" in each.rest
    )
    extras = re.search(r'"\.\[([a-z0-9,]+)\]"', install)
    assert extras
    assert set(extras[1].split(",")) <= SERVING_EXTRAS


@pytest.mark.parametrize("unwanted", ["torch", "train", "dev", "gcc", "build-essential", "apt-get"])
def test_nothing_of_training_or_building_is_installed(unwanted: str) -> None:
    commands = " ".join(each.rest for each in INSTRUCTIONS if each.name == "RUN")
    assert not re.search(rf"\b{unwanted}\b", commands)


def test_what_is_copied_exists() -> None:
    sources = [source for each in INSTRUCTIONS if each.name == "COPY" and "--from" not in each.rest
               for source in each.rest.split()[:-1]]  # fmt: skip
    assert sources
    assert all((REPOSITORY / source).exists() for source in sources)


def test_the_final_stage_holds_no_source_tree() -> None:
    assert [each.rest for each in FINAL if each.name == "COPY"] == ["--from=build /opt/sotto /opt/sotto"]


def test_the_build_sees_what_the_wheel_is_made_of_and_nothing_else() -> None:
    rules = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    assert (rules[0], admitted) == ("*", wheel_sources())


def test_every_setting_exists() -> None:
    settings = {name for name in environment() if name.startswith(PREFIX)}
    assert settings <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_it_listens_outside_the_container_and_keeps_its_data_in_the_volume() -> None:
    variables = environment()
    assert (variables["SOTTO_HOST"], variables["SOTTO_DATA_DIR"]) == ("0.0.0.0", final("VOLUME"))


def test_onnx_runtime_reports_to_nobody() -> None:
    assert environment()["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_exposed_port_is_the_one_listened_on() -> None:
    assert int(final("EXPOSE")) == Settings().port


def test_it_serves() -> None:
    assert json.loads(final("CMD")) == ["sotto", "serve"]


def health_check(port: int) -> int:
    """Exit status of the image's HEALTHCHECK."""
    command = json.loads(final("HEALTHCHECK").partition(" CMD ")[2])
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], env={**os.environ, "SOTTO_PORT": str(port)}, capture_output=True, check=False
    )
    return done.returncode


def test_the_health_check_passes_on_a_running_service(service: RunningService) -> None:
    assert health_check(int(service.url.rpartition(":")[2])) == 0


def test_the_health_check_fails_where_nothing_listens() -> None:
    # Port 1 (tcpmux) is below what the service or any test of ours binds.
    assert health_check(1) == 1


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """The image has no source tree to fall back on: what setuptools leaves out is gone."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, the build backend, in the environment of the tests")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for path in (REPOSITORY / name for name in wheel_sources()):
        if path.is_dir():
            # As .dockerignore does: nobody is served by what others are distilled from.
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__", "teachers"))
        elif path.is_file():
            shutil.copy(path, source)
    files = {str(path.relative_to(source)) for path in source.glob("*/**/*") if path.is_file()}
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    assert files - set(zipfile.ZipFile(wheel).namelist()) == set()
