"""Databases for profiles: a file, and a PostgreSQL server that these tests start for themselves. Speakers of the one
service that leave nothing behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest

from model_store import LocalStore, Manifest
from tests.conftest import RunningService, encoded, voice
from tests.service.asking import ADA, answer


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a server, without a database's name."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs a PostgreSQL server (Debian package postgresql)")
    # It refuses to run as root.
    other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="sotto-postgres-"))
    if other:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [*other, str(programs[-1] / program), "-D", str(folder / "data"), *arguments]
        # Not captured: the server would inherit the pipe, and nobody would see its end.
        with (folder / "log").open("a") as log:
            subprocess.run(command, check=True, cwd=folder, stdout=log, stderr=log)

    try:
        run("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        run("pg_ctl", "start", "--wait", "-o", f"-p {port} -c listen_addresses=127.0.0.1 -k '' -c fsync=off")
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}"
        run("pg_ctl", "stop", "--wait", "--mode=immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """Of an empty database."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(postgres.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database, one of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/profiles.sqlite3"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(scope="module")
def manifest(builtin_store: LocalStore) -> Manifest:
    return builtin_store.resolve("sotto-edge").manifest


@pytest.fixture
def speakers(service: RunningService) -> Iterator[str]:
    """A prefix for speaker ids; whoever has it is gone afterwards."""
    prefix = "routes-"
    yield prefix
    for speaker in answer(service.get("/v1/speakers", params={"limit": 1000}))["speakers"]:
        if speaker["speaker_id"].startswith(prefix):
            assert httpx.delete(f"{service.url}/v1/speakers/{speaker['speaker_id']}").status_code == 204


@pytest.fixture
def ada(service: RunningService, speakers: str) -> str:
    """The id of an enrolled speaker."""
    body = answer(service.post(f"/v1/speakers/{speakers}ada/enrollments", encoded(voice(6, **ADA))))
    assert body["status"] == "enrolled"
    return body["speaker_id"]
