"""A service that is stopped while clients go on: what was asked is answered, once, or was not taken in."""

from __future__ import annotations

import asyncio
import http.client
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
import uvloop

from service.app import create_app
from service.listening import Listener, bind
from service.protocol import protocol_for
from service.server import Server
from service.settings import Settings
from tests.conftest import RunningService, encoded, start_service, voice

CLIENTS = 8
DELAY_S = 1.0
PATIENCE_S = 60.0
CLIP = encoded(voice(1.0))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when, on which connection it was how manieth, and the status, if there was an answer."""

    at: float
    earlier: int
    status: int | None
    closes: bool


def go_on_asking(port: int, found: list[Asked], enough: threading.Event) -> None:
    """On one connection, and another once that is closed, until nobody listens any more."""
    while not enough.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        try:
            connection.connect()
        except ConnectionRefusedError:
            return
        # As clients that keep connections do, rather than open another behind one's back.
        connection.auto_open = 0
        earlier = 0
        while connection.sock is not None and not enough.is_set():
            at = time.monotonic()
            try:
                connection.request("POST", "/v1/keywords/detect", CLIP, {"Content-Type": "audio/wav"})
                answer = connection.getresponse()
            except (ConnectionError, http.client.RemoteDisconnected):
                # Not a byte of an answer: may be asked again, elsewhere.
                found.append(Asked(at, earlier, None, closes=True))
                break
            body = answer.read()
            assert body.startswith(b'{"model"') or answer.status != 200
            found.append(Asked(at, earlier, answer.status, closes=answer.getheader("connection") == "close"))
            earlier += 1
        connection.close()


def test_clients_that_go_on_asking_while_it_stops_lose_nothing(tmp_path: Path, started: list[RunningService]) -> None:
    service = start_service(tmp_path, shutdown_delay_s=str(DELAY_S))
    started.append(service)
    port = int(service.url.rsplit(":", 1)[1])
    each: list[list[Asked]] = [[] for _ in range(CLIENTS)]
    enough = threading.Event()
    threads = [threading.Thread(target=go_on_asking, args=(port, found, enough)) for found in each]
    for thread in threads:
        thread.start()
    try:
        end = time.monotonic() + PATIENCE_S
        while not all(len(found) >= 5 for found in each):
            assert time.monotonic() < end
            time.sleep(0.02)
        stopped_at = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE_S) == 0
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        enough.set()
    asked = [one for found in each for one in found]
    assert {one.status for one in asked} <= {200, None}
    # It is not taken in as listening ends; what is under way then, and what comes in the delay, is answered.
    lost = [one for one in asked if one.status is None]
    assert len(lost) <= CLIENTS
    assert all(one.at >= stopped_at + 0.9 * DELAY_S for one in lost)
    # Nor is a connection closed that has been used: its client was told with the answer before.
    assert all(one.earlier == 0 for one in lost)
    late = [one for one in asked if one.status == 200 and one.at > stopped_at + 0.5 * DELAY_S]
    assert len(late) >= CLIENTS
    assert all(one.closes for one in late)


def test_a_connection_that_is_still_being_taken_in_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be waited for until it says something, or until the grace is over."""
    settings = Settings(data_dir=tmp_path, head_timeout_s=0.5)
    app = create_app(settings)
    runtime = app.state.runtime
    runtime.start()
    (bound,) = bind("127.0.0.1", 0)
    address = bound.getsockname()
    open_at_once = Listener._open

    async def open_late(listener: Listener, connection: socket.socket) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while listener._bound.fileno() >= 0:
                await asyncio.sleep(0.01)
        await open_at_once(listener, connection)

    monkeypatch.setattr(Listener, "_open", open_late)
    config = uvicorn.Config(app, http=protocol_for(settings, runtime.metrics), log_level="warning")
    server = Server(config, settings, runtime)

    async def work() -> bytes:
        serving = asyncio.create_task(server.serve([bound]))
        async with asyncio.timeout(PATIENCE_S):
            while not getattr(server, "servers", ()):
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*address)
            server.should_exit = True
            heard = await reader.read()
            writer.close()
            await serving
        return heard

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(work()) == b""
