"""A database of profiles into another: to back it up, to put it back, to grow from SQLite into PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Table, func, select, text
from sqlalchemy.engine import URL, Connection, make_url

from service.speakers.connections import open_engine
from service.speakers.store import NEWEST, ProfileStore, translated, version_of
from service.speakers.tables import Base, SpeakerRow

# Rows that are in memory at once.
PAGE = 1000


class CopyError(Exception):
    """Nothing was copied, and why."""


def url_of(place: str) -> URL:
    """A URL as it is, or that of a SQLite file. Raises CopyError for what is neither."""
    if "://" not in place:
        return make_url(f"sqlite:///{Path(place).resolve()}")
    try:
        return make_url(place)
    except Exception as error:
        raise CopyError(f"this is no URL of a database: {error}") from error


def copy_profiles(source: URL, destination: URL) -> int:
    """Copy all speakers of all tenants, as they are at one moment, into a database that has none; how many there were.
    All or nothing. Raises CopyError, StorageUnavailableError."""
    if source == destination:
        raise CopyError("source and destination are one database")
    if source.get_backend_name() == "sqlite" and not Path(str(source.database)).is_file():
        raise CopyError(f"there is no file {source.database}")
    engine, watchdog = open_engine(source)
    if source.get_backend_name() == "postgresql":
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    into = ProfileStore(destination.render_as_string(hide_password=False))
    try:
        with translated(), engine.begin() as reading, into.writing() as writing:
            found = version_of(reading)
            if found != NEWEST:
                raise CopyError(
                    f"the source's tables are of version {found}, this sotto's of {NEWEST}; serve it once with this one"
                )
            if writing.scalar(select(func.count()).select_from(SpeakerRow)):
                raise CopyError("the destination has speakers already")
            for table in Base.metadata.sorted_tables:
                _copy(table, reading, writing)
            return int(writing.scalar(select(func.count()).select_from(SpeakerRow)) or 0)
    finally:
        into.close()
        if watchdog is not None:
            watchdog.close()
        engine.dispose()


def _copy(table: Table, reading: Connection, writing: Connection) -> None:
    writing.execute(table.delete())
    for page in _pages(table, reading):
        writing.execute(table.insert(), page)
    if "id" in table.c and writing.dialect.name == "postgresql":
        # What is inserted with its number does not count it on.
        name = f"pg_get_serial_sequence('{table.name}', 'id')"
        writing.execute(text(f"SELECT setval({name}, (SELECT max(id) FROM {table.name})) FROM {table.name} LIMIT 1"))


def _pages(table: Table, reading: Connection) -> Iterator[list[dict[str, Any]]]:
    """By number where rows have one. The other tables have a row for each tenant or model."""
    key = table.c.get("id")
    last = 0
    while True:
        query = select(table) if key is None else select(table).where(key > last).order_by(key).limit(PAGE)
        rows = [{name: _in_utc(value) for name, value in row._mapping.items()} for row in reading.execute(query)]
        if rows:
            yield rows
        if key is None or len(rows) < PAGE:
            return
        last = rows[-1]["id"]


def _in_utc(value: Any) -> Any:
    """SQLite drops the zone, PostgreSQL tells the server's."""
    if not isinstance(value, datetime):
        return value
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
