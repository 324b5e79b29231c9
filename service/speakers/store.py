"""Profiles in SQL: SQLite in a file by default, PostgreSQL by URL; the same SQLAlchemy code for both.

What was acknowledged is on disk: SQLite runs with a write-ahead log and full synchronisation. What was
deleted is gone from it: freed pages are overwritten and the log is emptied.
"""

from __future__ import annotations

import builtins
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Select, func, inspect, select, text, tuple_
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import StorageUnavailableError
from service.speakers.connections import Watchdog, open_engine
from service.speakers.tables import EnrolmentRow, RevisionRow, SpaceRow, SpeakerRow
from service.speakers.turns import TURNS

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
RETRY_AFTER_S = 2.0
MIGRATIONS = Path(__file__).parent / "migrations"
# Version of the tables that this code reads and writes.
NEWEST = max(path.stem.partition("_")[0] for path in (MIGRATIONS / "versions").glob("0*.py"))
MIGRATION_LOCK = 0x50_77_70
TELL_EVERY_S = 10.0
_told: dict[str, float] = {}
# The same words to SQLite and PostgreSQL.
NEXT_REVISION = text(
    "INSERT INTO revisions (tenant, revision) VALUES (:tenant, 1) "
    "ON CONFLICT (tenant) DO UPDATE SET revision = revisions.revision + 1 RETURNING revision"
)
CLAIM = text(
    "INSERT INTO spaces (model_name, model_version, mark) VALUES (:name, :version, :mark) "
    "ON CONFLICT (model_name, model_version) DO NOTHING"
)


@dataclass(frozen=True, slots=True)
class Enrolment:
    """One accepted clip as stored; `embedding` is [D], unit length."""

    model_name: str
    model_version: int
    embedding: Array
    speech_s: float
    snr_db: float


class Place(NamedTuple):
    """Where a speaker's last change stands among all of the tenant's."""

    revision: int
    id: int


@dataclass(slots=True)
class Change:
    """A speaker since the last change: what made the embeddings, and those themselves, float32 in little-endian."""

    place: Place
    speaker_id: str
    speech_s: float = 0.0
    models: set[tuple[str, int]] = field(default_factory=set)
    embeddings: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything known of one speaker."""

    speaker_id: str
    created_at: datetime
    updated_at: datetime
    enrolments: tuple[Enrolment, ...]

    @property
    def speech_s(self) -> float:
        return sum(enrolment.speech_s for enrolment in self.enrolments)


class ProfileStore:
    """Blocking; call from a thread. Every method raises StorageUnavailableError when the database fails."""

    def __init__(self, url: str) -> None:
        """Creates the file and the tables, or brings them up to date."""
        parsed = make_url(url)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        if self._sqlite and parsed.database not in (None, "", ":memory:"):
            with translated():
                Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        log.info("opening the profile database at %s", parsed.render_as_string())
        self._engine, self._watchdog = open_engine(parsed)
        # Same pool. What takes two questions is to see one moment; SQLite's transactions do by themselves.
        self._reader = (
            self._engine if self._sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )
        # Likewise; its transactions take SQLite's write lock from their start.
        self._writer = self._engine.execution_options(sotto_writes=True)
        self._log_holds_deleted = False
        self._turn = TURNS[parsed.database] if self._sqlite else nullcontext
        with translated(), self._turn():
            _migrate(self._writer, self._watchdog)

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction for what may take long; all others that write wait."""
        patient = nullcontext() if self._watchdog is None else self._watchdog.asleep()
        with translated(), self._turn(), patient, self._writer.begin() as connection:
            yield connection

    def ping(self) -> None:
        """Whether the database answers."""
        with translated(), self._engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def add(self, tenant: str, speaker_id: str, enrolments: Sequence[Enrolment]) -> Profile:
        """Append clips, creating the speaker where new; durable on return."""
        profile = self.enrol(tenant, speaker_id, lambda _: enrolments)
        assert profile is not None
        return profile

    def enrol(
        self, tenant: str, speaker_id: str, accept: Callable[[Profile | None], Sequence[Enrolment]]
    ) -> Profile | None:
        """Append the clips that `accept` takes into the profile as it is, while nobody else can change it; durable on
        return. None where there is no profile and none was taken."""
        now = datetime.now(UTC)
        with translated(), self._turn(), Session(self._writer) as session:
            revision = _next_revision(session, tenant)
            row = self._find(session, tenant, speaker_id)
            before = None if row is None else self._profile(session, row)
            enrolments = accept(before)
            if not enrolments:
                return before
            if row is None:
                row = SpeakerRow(tenant=tenant, speaker_id=speaker_id, created_at=now, enrolments=[])
                session.add(row)
            row.updated_at = now
            row.revision = revision
            for enrolment in enrolments:
                row.enrolments.append(
                    EnrolmentRow(
                        model_name=enrolment.model_name,
                        model_version=enrolment.model_version,
                        embedding=enrolment.embedding.astype("<f4").tobytes(),
                        speech_s=enrolment.speech_s,
                        snr_db=enrolment.snr_db,
                        created_at=now,
                    )
                )
            session.flush()
            profile = self._profile(session, row)
            session.commit()
            self._empty_log()
            return profile

    def get(self, tenant: str, speaker_id: str) -> Profile | None:
        """The profile, or None."""
        found = self.named(tenant, [speaker_id])
        return found[0] if found else None

    def list(self, tenant: str, *, after: str, limit: int) -> list[Profile]:
        """Up to `limit` profiles whose id sorts after `after`."""
        with translated(), Session(self._reader) as session:
            query = select(SpeakerRow.id).where(SpeakerRow.tenant == tenant, SpeakerRow.speaker_id > after)
            return _read(session, query, SpeakerRow.speaker_id, limit)

    def named(self, tenant: str, speaker_ids: Sequence[str]) -> builtins.list[Profile]:
        """Those of these speakers that there are, in order of their ids."""
        with translated(), Session(self._reader) as session:
            query = select(SpeakerRow.id).where(SpeakerRow.tenant == tenant, SpeakerRow.speaker_id.in_(speaker_ids))
            return _read(session, query, SpeakerRow.speaker_id)

    def count(self, tenant: str) -> int:
        """How many speakers there are."""
        with translated(), Session(self._engine) as session:
            query = select(func.count()).select_from(SpeakerRow).where(SpeakerRow.tenant == tenant)
            return int(session.scalar(query) or 0)

    def ids(self, tenant: str) -> set[str]:
        """Of all speakers."""
        with translated(), Session(self._engine) as session:
            return set(session.scalars(select(SpeakerRow.speaker_id).where(SpeakerRow.tenant == tenant)))

    def claim(self, space: tuple[str, int], mark: Array) -> Array:
        """The mark of the network that the space belongs to, which is this one where it had none. Marks are [D]."""
        name, version = space
        of_space = (SpaceRow.model_name == name, SpaceRow.model_version == version)
        # Writing takes SQLite's lock, and most find it there.
        with translated(), Session(self._engine) as session:
            found = session.scalar(select(SpaceRow.mark).where(*of_space))
        if found is None:
            values = {"name": name, "version": version, "mark": mark.astype("<f4").tobytes()}
            with translated(), self._turn(), Session(self._writer) as session:
                session.execute(CLAIM, values)
                session.commit()
                found = session.scalar(select(SpaceRow.mark).where(*of_space))
        assert found is not None
        return np.frombuffer(found, dtype="<f4").astype(np.float32)

    def revision(self, tenant: str) -> int:
        """Greater after every change of the tenant's speakers, whichever process made it."""
        with translated(), Session(self._engine) as session:
            return session.scalar(select(RevisionRow.revision).where(RevisionRow.tenant == tenant)) or 0

    def changes(self, tenant: str, *, after: Place, limit: int) -> builtins.list[Change]:
        """Up to `limit` speakers that were changed after a place, in the order of their changes."""
        place = tuple_(SpeakerRow.revision, SpeakerRow.id)
        chosen = (
            select(SpeakerRow.revision, SpeakerRow.id, SpeakerRow.speaker_id)
            .where(SpeakerRow.tenant == tenant, place > tuple_(*after))
            .order_by(SpeakerRow.revision, SpeakerRow.id)
            .limit(limit)
            .subquery()
        )
        entry = (EnrolmentRow.model_name, EnrolmentRow.model_version, EnrolmentRow.speech_s, EnrolmentRow.embedding)
        query = select(chosen, *entry).join(EnrolmentRow, EnrolmentRow.speaker == chosen.c.id)
        found: builtins.list[Change] = []
        with translated(), self._engine.connect() as connection:
            order = (chosen.c.revision, chosen.c.id, EnrolmentRow.id)
            for revision, row, speaker_id, name, version, speech_s, embedding in connection.execute(
                query.order_by(*order)
            ):
                if not found or found[-1].place.id != row:
                    found.append(Change(Place(revision, row), speaker_id))
                change = found[-1]
                change.models.add((name, version))
                change.speech_s += speech_s
                change.embeddings.append(embedding)
        return found

    def delete(self, tenant: str, speaker_id: str) -> bool:
        """Remove every stored byte of the speaker; False where there was none."""
        with translated(), self._turn():
            with Session(self._writer) as session:
                _next_revision(session, tenant)
                row = self._find(session, tenant, speaker_id)
                if row is None:
                    return False
                session.delete(row)
                session.commit()
            self._log_holds_deleted = self._sqlite
            self._empty_log()
            return True

    def _empty_log(self) -> None:
        """Deleted pages are overwritten in the file only when the log is written back. Who reads for long, as a backup
        does, or a full disk prevents it: then the next change tries again."""
        if not self._log_holds_deleted:
            return
        raw = self._engine.raw_connection()
        try:
            (prevented, *_) = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._log_holds_deleted = bool(prevented)
        except sqlite3.Error as error:
            # The change itself is on disk.
            log.warning("the profile database's log could not be emptied: %s", error)
        finally:
            raw.close()

    def _profile(self, session: Session, row: SpeakerRow) -> Profile:
        (profile,) = _read(session, select(SpeakerRow.id).where(SpeakerRow.id == row.id), SpeakerRow.id)
        return profile

    def _find(self, session: Session, tenant: str, speaker_id: str) -> SpeakerRow | None:
        return session.scalar(
            select(SpeakerRow).where(SpeakerRow.tenant == tenant, SpeakerRow.speaker_id == speaker_id)
        )


def _next_revision(session: Session, tenant: str) -> int:
    """First of all in a transaction that changes anything: those of one tenant then wait for each other."""
    return int(session.scalar(NEXT_REVISION, {"tenant": tenant}))


def _read(
    session: Session, speakers: Select[Any], order: InstrumentedAttribute[Any], limit: int | None = None
) -> list[Profile]:
    """In this order. Columns instead of objects: a third of the time, most of which holds the interpreter's lock."""
    chosen = speakers.order_by(order).limit(limit)
    columns = (SpeakerRow.id, SpeakerRow.speaker_id, SpeakerRow.created_at, SpeakerRow.updated_at)
    people = session.execute(select(*columns).where(SpeakerRow.id.in_(chosen)).order_by(order)).all()
    entry = (
        EnrolmentRow.speaker,
        EnrolmentRow.model_name,
        EnrolmentRow.model_version,
        EnrolmentRow.embedding,
        EnrolmentRow.speech_s,
        EnrolmentRow.snr_db,
    )
    enrolments: dict[int, list[Enrolment]] = {}
    entries = select(*entry).where(EnrolmentRow.speaker.in_(chosen)).order_by(EnrolmentRow.id)
    for speaker, name, version, embedding, speech_s, snr_db in session.execute(entries):
        vector = np.frombuffer(embedding, dtype="<f4").astype(np.float32)
        enrolments.setdefault(speaker, []).append(Enrolment(name, version, vector, speech_s, snr_db))
    return [
        Profile(speaker_id, _aware(created_at), _aware(updated_at), tuple(enrolments[row]))
        for row, speaker_id, created_at, updated_at in people
    ]


def _aware(moment: datetime) -> datetime:
    # SQLite drops the zone; all times are stored in UTC.
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _migrate(engine: Engine, watchdog: Watchdog | None) -> None:
    with engine.begin() as connection:
        if version_of(connection) == NEWEST:
            return
    with nullcontext() if watchdog is None else watchdog.asleep(), engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Tables are changed in the time that it takes. Replicas that start together take turns.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        found = version_of(connection)
        if found == NEWEST:
            return
        if found is not None and found > NEWEST:
            raise StorageUnavailableError(
                f"the profile database is of a newer version ({found}) than this service ({NEWEST})",
                retry_after_s=RETRY_AFTER_S,
            )
        # Here, since most starts find nothing to do and it takes a tenth of all that they import.
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def version_of(connection: Connection) -> str | None:
    """Of the tables; None where there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found


@contextmanager
def translated() -> Iterator[None]:
    """Around what talks to a database: raises StorageUnavailableError for whatever goes wrong there."""
    try:
        yield
    except (DBAPIError, SQLAlchemyError, OSError) as error:
        _tell(error)
        raise StorageUnavailableError(
            "the profile database cannot be used right now; nothing was changed", retry_after_s=RETRY_AFTER_S
        ) from error


def _tell(error: Exception) -> None:
    """Now and then: while a database fails, every call of it does."""
    now = time.monotonic()
    if now - _told.get("at", -math.inf) > TELL_EVERY_S:
        _told["at"] = now
        # Drivers write several lines; the statement, which SQLAlchemy adds, has embeddings in it.
        log.warning("the profile database failed: %s", " ".join(str(getattr(error, "orig", None) or error).split()))
