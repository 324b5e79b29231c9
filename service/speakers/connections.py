"""Connections to the database of profiles that never wait for ever.

SQLite waits for locks, and no longer than it is told. A database behind a network can be lost in more ways: it takes no
connections, its host is gone without a word, a statement waits for a lock, or something answers TCP and nothing else
(a stopped server, a proxy before a dead one). The first three have settings; the last has `Watchdog`.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DisconnectionError

log = logging.getLogger(__name__)

# For SQLite's lock, which another process may hold.
BUSY_TIMEOUT_MS = 5_000
# libpq's names. The user's own, in the URL, count more.
POSTGRES = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "8000",
}
# As statements, since poolers such as PgBouncer refuse them among a connection's parameters.
POSTGRES_SESSION = ("SET statement_timeout = 8000", "SET lock_timeout = 4000")
# Longer than a statement may take by those.
SILENCE_S = 12.0
LOOK_EVERY_S = 1.0


def open_engine(url: URL) -> tuple[Engine, Watchdog | None]:
    """Connects to nothing yet. The watchdog, of a database behind a network, is to be closed with the engine."""
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin)
        return engine, None
    if url.get_backend_name() != "postgresql":
        return create_engine(url, pool_pre_ping=True), None
    given = {name: value for name, value in POSTGRES.items() if name not in url.query}
    engine = create_engine(url, connect_args=given)
    watchdog = Watchdog(engine, SILENCE_S)
    if "options" not in url.query:
        event.listen(engine, "connect", _limit_statements)
    return engine, watchdog


class Watchdog:
    """Shuts the socket of whoever waits for a database that says nothing for `silence_s`; the waiting call then fails.

    From a thread of its own: those that wait hang in the driver, and the event loop has other things to do.
    """

    def __init__(self, engine: Engine, silence_s: float) -> None:
        self._silence_s = silence_s
        self._dialect = engine.dialect
        # By the pool's record of a connection: the connection, and when its database was last asked.
        self._asked: dict[Any, tuple[Any, float]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkout", self._taken)
        event.listen(engine, "checkin", self._given_back)
        event.listen(engine, "before_cursor_execute", self._asks)
        event.listen(engine, "after_cursor_execute", self._was_told)
        event.listen(engine, "commit", self._asks)
        threading.Thread(target=self._watch, name="profiles-watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """For what may take long, such as a migration."""
        silence_s, self._silence_s = self._silence_s, math.inf
        try:
            yield
        finally:
            self._silence_s = silence_s

    def _begin(self, record: Any, connection: Any) -> None:
        with self._lock:
            self._asked[record] = connection, time.monotonic()

    def _connected(self, connection: Any, record: Any) -> None:
        self._begin(record, connection)

    def _taken(self, connection: Any, record: Any, _proxy: Any) -> None:
        """In place of `pool_pre_ping`, which asks before anyone is told that it does."""
        self._begin(record, connection)
        try:
            self._dialect.do_ping(connection)
        except Exception as error:
            raise DisconnectionError from error
        self._given_back(connection, record)

    def _given_back(self, _connection: Any, record: Any) -> None:
        with self._lock:
            self._asked.pop(record, None)

    def _was_told(self, connection: Any, *_: Any) -> None:
        fairy = connection.connection
        self._given_back(fairy.dbapi_connection, fairy._connection_record)

    def _asks(self, connection: Any, *_: Any) -> None:
        fairy = connection.connection
        self._begin(fairy._connection_record, fairy.dbapi_connection)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            before = time.monotonic() - self._silence_s
            with self._lock:
                silent = [record for record, (_, asked) in self._asked.items() if asked < before]
                connections = [self._asked.pop(record)[0] for record in silent]
            for connection in connections:
                log.warning("the profile database said nothing for %g s; the connection is cut", self._silence_s)
                _cut(connection)


def _limit_statements(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        for statement in POSTGRES_SESSION:
            cursor.execute(statement)
    # Or the first rollback would undo them.
    connection.commit()


def _cut(connection: Any) -> None:
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as copy:
            copy.shutdown(socket.SHUT_RDWR)
    # Closed meanwhile; drivers have errors of their own for that.
    except Exception as error:
        log.debug("nothing to cut: %s", error)


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver must not open transactions by itself: `_begin` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _begin(connection: Any) -> None:
    # Taking the write lock at once turns two writers into one after the other; taken later, the second
    # one's upgrade fails without waiting.
    writes = connection.get_execution_options().get("sotto_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
