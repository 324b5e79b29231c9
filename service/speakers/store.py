"""Profiles in SQL: SQLite in a file by default, PostgreSQL by URL; the same SQLAlchemy code for both.

What was acknowledged is on disk: SQLite runs with a write-ahead log and full synchronisation. What was
deleted is gone from it: freed pages are overwritten and the log is emptied.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from alembic import command
from alembic.config import Config
from sqlalchemy import (
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    create_engine,
    event,
    select,
    text,
)
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from service.errors import StorageUnavailableError

Array = npt.NDArray[np.float32]
BUSY_TIMEOUT_MS = 5_000
RETRY_AFTER_S = 2.0
MIGRATION_LOCK = 0x50_77_70


class Base(DeclarativeBase):
    """Tables of the service."""


class SpeakerRow(Base):
    """One enrolled person of one tenant."""

    __tablename__ = "speakers"
    __table_args__ = (Index("ix_speakers_tenant_speaker", "tenant", "speaker_id", unique=True),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    speaker_id: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    enrolments: Mapped[list[EnrolmentRow]] = relationship(
        cascade="all, delete-orphan", order_by="EnrolmentRow.id", lazy="selectin"
    )


class EnrolmentRow(Base):
    """One accepted clip: its embedding, never its audio."""

    __tablename__ = "enrolments"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    speaker: Mapped[int] = mapped_column(ForeignKey("speakers.id", ondelete="CASCADE"), index=True)
    model_name: Mapped[str] = mapped_column(String(64))
    model_version: Mapped[int] = mapped_column(Integer)
    embedding: Mapped[bytes] = mapped_column(LargeBinary)
    speech_s: Mapped[float] = mapped_column(Float)
    snr_db: Mapped[float] = mapped_column(Float)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


@dataclass(frozen=True, slots=True)
class Enrolment:
    """One accepted clip as stored; `embedding` is [D], unit length."""

    model_name: str
    model_version: int
    embedding: Array
    speech_s: float
    snr_db: float


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
            with _translated():
                Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._engine = create_engine(parsed, pool_pre_ping=not self._sqlite)
        if self._sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin)
        # Same pool; its transactions take SQLite's write lock from their start.
        self._writer = self._engine.execution_options(sotto_writes=True)
        with _translated():
            _migrate(self._writer)

    def close(self) -> None:
        self._engine.dispose()

    def ping(self) -> None:
        """Whether the database answers."""
        with _translated(), self._engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def add(self, tenant: str, speaker_id: str, enrolments: Sequence[Enrolment]) -> Profile:
        """Append accepted clips, creating the speaker where new; durable on return."""
        with _translated(), Session(self._writer) as session:
            try:
                return self._add(session, tenant, speaker_id, enrolments)
            except IntegrityError:
                # Two first enrolments at once: the other one created the row.
                session.rollback()
                return self._add(session, tenant, speaker_id, enrolments)

    def get(self, tenant: str, speaker_id: str) -> Profile | None:
        """The profile, or None."""
        with _translated(), Session(self._engine) as session:
            row = self._find(session, tenant, speaker_id)
            return None if row is None else _profile(row)

    def list(self, tenant: str, *, after: str, limit: int) -> list[Profile]:
        """Up to `limit` profiles whose id sorts after `after`."""
        with _translated(), Session(self._engine) as session:
            query = (
                select(SpeakerRow)
                .where(SpeakerRow.tenant == tenant, SpeakerRow.speaker_id > after)
                .order_by(SpeakerRow.speaker_id)
                .limit(limit)
            )
            return [_profile(row) for row in session.scalars(query)]

    def named(self, tenant: str, speaker_ids: Sequence[str]) -> builtins.list[Profile]:
        """Those of these speakers that there are, in order of their ids."""
        with _translated(), Session(self._engine) as session:
            query = (
                select(SpeakerRow)
                .where(SpeakerRow.tenant == tenant, SpeakerRow.speaker_id.in_(speaker_ids))
                .order_by(SpeakerRow.speaker_id)
            )
            return [_profile(row) for row in session.scalars(query)]

    def delete(self, tenant: str, speaker_id: str) -> bool:
        """Remove every stored byte of the speaker; False where there was none."""
        with _translated():
            with Session(self._writer) as session:
                row = self._find(session, tenant, speaker_id)
                if row is None:
                    return False
                session.delete(row)
                session.commit()
            if self._sqlite:
                # Deleted pages are overwritten in the file only when the log is written back.
                raw = self._engine.raw_connection()
                try:
                    raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                finally:
                    raw.close()
            return True

    def _add(self, session: Session, tenant: str, speaker_id: str, enrolments: Sequence[Enrolment]) -> Profile:
        now = datetime.now(UTC)
        row = self._find(session, tenant, speaker_id)
        if row is None:
            row = SpeakerRow(tenant=tenant, speaker_id=speaker_id, created_at=now, updated_at=now, enrolments=[])
            session.add(row)
        row.updated_at = now
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
        profile = _profile(row)
        session.commit()
        return profile

    def _find(self, session: Session, tenant: str, speaker_id: str) -> SpeakerRow | None:
        return session.scalar(
            select(SpeakerRow).where(SpeakerRow.tenant == tenant, SpeakerRow.speaker_id == speaker_id)
        )


def _profile(row: SpeakerRow) -> Profile:
    return Profile(
        speaker_id=row.speaker_id,
        created_at=_aware(row.created_at),
        updated_at=_aware(row.updated_at),
        enrolments=tuple(
            Enrolment(
                model_name=entry.model_name,
                model_version=entry.model_version,
                embedding=np.frombuffer(entry.embedding, dtype="<f4").astype(np.float32),
                speech_s=entry.speech_s,
                snr_db=entry.snr_db,
            )
            for entry in row.enrolments
        ),
    )


def _aware(moment: datetime) -> datetime:
    # SQLite drops the zone; all times are stored in UTC.
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


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


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Replicas that start together take turns.
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, SQLAlchemyError, OSError) as error:
        raise StorageUnavailableError(
            "the profile database cannot be used right now; nothing was changed", retry_after_s=RETRY_AFTER_S
        ) from error
