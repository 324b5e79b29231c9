"""The service in a thread of this process, over real connections; and waiting for what it does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service.protocol import BoundedHttp
from service.websocket import BoundedStream

PATIENCE_S = 60.0


@contextmanager
def serving(app: FastAPI, http: type[BoundedHttp], *, keep_alive_s: int = 5) -> Iterator[tuple[uvicorn.Server, int]]:
    """The server and its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=http,
            ws=BoundedStream,
            ws_ping_interval=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=keep_alive_s,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
