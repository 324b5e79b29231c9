"""A database of profiles that is gone without a word takes nothing with it but the speakers."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from service.errors import DeadlineExceededError, StorageUnavailableError
from service.speakers import connections, threads
from service.speakers.store import ProfileStore
from service.speakers.threads import ProfileThreads
from tests.conftest import RunningService, encoded, start_service, voice
from tests.service.threads import PATIENCE_S, until


class Proxy:
    """In front of a server; can fall mute, as a proxy does whose server is gone: it takes all and says nothing."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self.mute = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        for one in (self._listening, *self._pairs):
            one.close()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(timeout=0.05):
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if self.mute:
                    time.sleep(0.01)
                elif ready is self._listening:
                    self._join(ready.accept()[0])
                elif ready in self._pairs:
                    self._pass_on(ready)

    def _join(self, one: socket.socket) -> None:
        other = socket.create_connection(("127.0.0.1", self._to))
        self._pairs |= {one: other, other: one}
        for end in (one, other):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, ready: socket.socket) -> None:
        other = self._pairs[ready]
        try:
            data = ready.recv(65_536)
            other.sendall(data)
        except OSError:
            data = b""
        if not data:
            for end in (ready, other):
                self._selector.unregister(end)
                self._pairs.pop(end)
                end.close()


@pytest.fixture
def proxied(postgres_url: str) -> Iterator[tuple[str, Proxy]]:
    """URL of an empty database behind a proxy."""
    url = make_url(postgres_url)
    assert url.port is not None
    proxy = Proxy(url.port)
    yield url.set(port=proxy.port).render_as_string(hide_password=False), proxy
    proxy.close()


def test_a_call_that_hears_nothing_fails_and_the_next_one_connects_anew(
    proxied: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SILENCE_S", 0.5)
    monkeypatch.setattr(connections, "LOOK_EVERY_S", 0.1)
    url, proxy = proxied
    store = ProfileStore(url)
    try:
        assert store.count("default") == 0
        proxy.mute = True
        begun = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            store.count("default")
        assert time.monotonic() - begun < PATIENCE_S
        proxy.mute = False
        assert store.count("default") == 0
    finally:
        store.close()


def test_statements_and_locks_have_their_limits_and_migrations_have_none(proxied: tuple[str, Proxy]) -> None:
    url, _ = proxied
    store = ProfileStore(url)
    try:
        with store._engine.connect() as connection:
            limits = [
                connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("statement_timeout", "lock_timeout")
            ]
    finally:
        store.close()
    assert limits == ["8s", "4s"]
    own = ProfileStore(f"{url}?options=-c%20statement_timeout%3D3000")
    try:
        with own._engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "3s"
    finally:
        own.close()


def test_a_service_whose_database_falls_mute_serves_everything_else(
    proxied: tuple[str, Proxy], tmp_path: Path, started: list[RunningService]
) -> None:
    url, proxy = proxied
    service = start_service(tmp_path, database_url=url, request_timeout_s="2")
    started.append(service)
    clip = encoded(voice(6))
    assert service.post("/v1/speakers/ada/enrollments", clip).status_code in (200, 201)
    proxy.mute = True
    # As many as there are threads for them.
    for _ in range(threads.THREADS + 1):
        assert service.get("/v1/speakers/ada").status_code in (503, 504)
    until(lambda: service.get("/readyz").status_code == 503)
    assert service.get("/readyz").json()["checks"] == {
        "accepting": True,
        "decoding": True,
        "inference": True,
        "profiles": False,
    }
    assert "sotto_ready 0.0" in service.get("/metrics").text
    assert service.get("/healthz").status_code == 200
    # Nobody waits for it any more.
    refused = service.get("/v1/speakers/ada")
    assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
    assert service.post("/v1/keywords/detect?model=sotto-edge@production", clip).status_code == 200
    assert service.get("/v1/models").status_code == 200
    proxy.mute = False
    until(lambda: service.get("/readyz").status_code == 200)
    assert service.get("/v1/speakers/ada").json()["speaker_id"] == "ada"
    until(lambda: "all checks are good again" in service.log.read_text())
    assert "failing checks: profiles" in service.log.read_text()


def test_a_service_whose_database_falls_mute_still_ends(
    proxied: tuple[str, Proxy], tmp_path: Path, started: list[RunningService]
) -> None:
    url, proxy = proxied
    service = start_service(tmp_path, database_url=url, request_timeout_s="1")
    started.append(service)
    proxy.mute = True
    assert service.get("/v1/speakers/ada").status_code in (503, 504)
    begun = time.monotonic()
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(PATIENCE_S) == 0
    assert time.monotonic() - begun < connections.SILENCE_S
    assert "leaving a thread behind" in service.log.read_text()


MUTE_STORE = """
import time
from pathlib import Path
from model_store import LocalStore
resolve = LocalStore.resolve
def hang(store, reference):
    while Path({flag!r}).exists():
        time.sleep(0.1)
    return resolve(store, reference)
LocalStore.resolve = hang
"""


def test_a_service_whose_model_store_falls_mute_serves_what_is_loaded_and_still_ends(
    tmp_path: Path, started: list[RunningService], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "mute"
    (tmp_path / "sitecustomize.py").write_text(MUTE_STORE.format(flag=str(flag)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    service = start_service(tmp_path, request_timeout_s="1")
    started.append(service)
    flag.touch()
    clip = encoded(voice(1.0))
    named = service.post("/v1/keywords/detect?model=sotto-micro", clip)
    assert (named.status_code, named.json()["code"]) == (504, "deadline_exceeded")
    assert service.post("/v1/keywords/detect", clip).status_code == 200
    assert service.get("/readyz").status_code == 200
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(PATIENCE_S) == 0
    assert flag.exists()
    assert "leaving a thread behind" in service.log.read_text()


def test_ready_without_profiles_where_an_operator_says_so(
    proxied: tuple[str, Proxy], tmp_path: Path, started: list[RunningService]
) -> None:
    url, proxy = proxied
    service = start_service(tmp_path, database_url=url, ready_without_profiles="true")
    started.append(service)
    proxy.mute = True
    until(lambda: service.get("/readyz").json()["checks"]["profiles"] is False)
    assert service.get("/readyz").json()["ready"] is True
    assert service.get("/readyz").status_code == 200


def test_while_calls_hang_others_are_refused_at_once_and_closing_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "CALL_PATIENCE_S", 0.2)
    monkeypatch.setattr(threads, "STUCK_S", 0.4)
    hangs = threading.Event()
    profiles = ProfileThreads(lambda: None)

    def soon() -> float:
        return time.monotonic() + 0.1

    try:
        assert asyncio.run(profiles.call(lambda: 7, soon())) == 7
        with pytest.raises(DeadlineExceededError):
            asyncio.run(profiles.call(lambda: hangs.wait(PATIENCE_S), soon()))
        until(lambda: not profiles.answers)
        with pytest.raises(StorageUnavailableError):
            asyncio.run(profiles.call(lambda: 7, soon()))
        until(lambda: profiles.stuck)
        assert not profiles.close(0.1)
        hangs.set()
        assert profiles.close(PATIENCE_S)
    finally:
        hangs.set()


def test_a_ping_that_hangs_or_fails_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PING_EVERY_S", 0.01)
    monkeypatch.setattr(threads, "PING_PATIENCE_S", 0.1)
    lets_go, fails = threading.Event(), threading.Event()

    def ping() -> None:
        lets_go.wait(PATIENCE_S)
        if fails.is_set():
            raise StorageUnavailableError("gone", retry_after_s=1.0)

    profiles = ProfileThreads(ping)
    try:
        until(lambda: not profiles.answers)
        lets_go.set()
        until(lambda: profiles.answers)
        fails.set()
        until(lambda: not profiles.answers)
        fails.clear()
        until(lambda: profiles.answers)
    finally:
        lets_go.set()
        assert profiles.close(PATIENCE_S)
