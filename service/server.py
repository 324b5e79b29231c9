"""Running the application under uvicorn: where it listens, what it prints, how it stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from service.app import create_app
from service.listening import Listener, bind
from service.protocol import NOT_ACCEPTED, BoundedHttp, cut_off_unread, protocol_for
from service.runtime import Runtime
from service.settings import Settings
from service.websocket import BoundedStream

log = logging.getLogger(__name__)

# Beside connections: the database, the model store, what libraries open.
OTHER_FILES = 256

# Objects made and not freed after which Python looks for cycles among them. By default 700: that is every few requests,
# and a sixth of the event loop's time where thousands are open.
YOUNG_OBJECTS = 10_000
# A thread that wants the interpreter asks whoever has it to let go after so long; by default 5 ms, as much as several
# graph calls, for which a worker's core is idle while the event loop is busy.
SWITCH_S = 0.001

# What they heard is computed and told, in far less.
STREAMS_END_S = 2.0

KEY_HEADER = " -H 'Authorization: Bearer KEY'"

WELCOME = """sotto listens on {url}   (API documentation: {url}/docs, metrics: {url}/metrics)
model {model}, {keywords} keywords

Open {url}/ in a browser, or try from another terminal in this folder:
  curl -s{key} --data-binary @examples/computer.wav -H 'Content-Type: audio/wav' {url}/v1/keywords/detect
  curl -s{key} --data-binary @examples/five-words.wav -H 'Content-Type: audio/wav' {url}/v1/keywords/detect
"""


class Server(uvicorn.Server):
    """uvicorn that announces itself once ready, turns unready before it drains, and exits 0 on SIGTERM."""

    def __init__(self, config: uvicorn.Config, settings: Settings, runtime: Runtime) -> None:
        super().__init__(config)
        self._settings = settings
        self._runtime = runtime
        self._stopping: asyncio.Task[None] | None = None
        self._cutting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Without listeners of its own: the sockets get ours.
        await super().startup([])
        if not self.started:
            return
        # Modules, routes, models: what is there by now mostly stays, and need not be looked through again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS)
        gc.enable()
        sys.setswitchinterval(SWITCH_S)
        kind: type[BoundedHttp] = self.config.http_protocol_class  # type: ignore[assignment]  # `run` chose it

        def protocol() -> BoundedHttp:
            return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        backlog = self.config.backlog
        self.servers = [Listener(bound, protocol, backlog) for bound in sockets or []]  # type: ignore[misc]  # all that uvicorn asks of a server
        # Also while it drains: a client that does not read must not use up the grace.
        self._cutting = asyncio.create_task(cut_off_unread(self.server_state.connections, self._settings))
        port = self.servers[0].sockets[0].getsockname()[1]
        host = _address(self._settings.host)
        manifest = self._runtime.engine.manifest
        text = WELCOME.format(
            url=f"http://{host}:{port}",
            model=f"{manifest.name}@{manifest.version}",
            keywords=len(manifest.keywords.labels),
            key=KEY_HEADER if self._settings.api_keys else "",
        )
        print(text, flush=True)  # noqa: T201  this is the command's output

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn tells the connections that it has: one that is still being taken in would be waited for, untold.
        for server in self.servers:
            server.close()
            await server.wait_closed()
        self.servers = []
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's own, does not raise the signal again at the end: an orderly stop is no failure."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self, number: signal.Signals) -> None:
        if self._stopping is not None:
            # Asked twice: whoever asks will not wait for stragglers.
            self.force_exit = True
            return
        self._runtime.draining = True
        self._runtime.metrics.ready.set(0)
        # Who keeps a connection is told to open another, elsewhere; it would be closed under a request otherwise.
        close = (b"connection", b"close")
        self.config.encoded_headers = [*self.config.encoded_headers, close]
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        self._stopping = asyncio.get_running_loop().create_task(self._stop_later(number))

    async def _stop_later(self, number: signal.Signals) -> None:
        """Load balancers need a moment to see /readyz fail; until then requests are still served. Streams have no end
        of their own that could be waited for."""
        await asyncio.sleep(self._settings.shutdown_delay_s)
        await self._runtime.streams.finish(min(STREAMS_END_S, self._settings.shutdown_grace_s))
        self.handle_exit(number, None)


def _address(host: str) -> str:
    """How a person on this machine reaches what listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def run(settings: Settings) -> int:
    """Serve until told to stop; the exit status, 1 where it cannot listen. Raises what Runtime.start does."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    app = create_app(settings)
    runtime: Runtime = app.state.runtime
    config = uvicorn.Config(
        app,
        http=protocol_for(settings, runtime.metrics),
        loop="uvloop",
        ws=BoundedStream,
        # Its pings would wait behind unread audio and end streams that are only slow; `stream_idle_s` ends dead ones.
        ws_ping_interval=None,
        ws_max_size=settings.stream_message_bytes,
        # Samples hardly compress, and what unpacks can be a bomb.
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        log_level=settings.log_level,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_grace_s)),
        server_header=False,
    )
    _allow_files(NOT_ACCEPTED * settings.limit_connections + OTHER_FILES)
    try:
        sockets = bind(settings.host, settings.port)
    except OSError as error:
        log.error("cannot listen on %s:%d: %s", settings.host, settings.port, (error.strerror or str(error)).lower())
        return 1
    # In the lifespan a failure would be uvicorn's, told as a traceback.
    runtime.start()
    server = Server(config, settings, runtime)
    server.run(sockets)
    if not runtime.closed:
        # Python would wait for that thread.
        log.error("leaving a thread behind that hangs in the profile database or the model store")
        logging.shutdown()
        os._exit(0)
    return 0 if server.started else 1


def _allow_files(wanted: int) -> None:
    """Raise this process's limit of open files as far as it may; many systems begin at 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
