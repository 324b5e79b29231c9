"""Tables of profiles; `migrations/` makes them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, DateTime, Float, ForeignKey, Index, Integer, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """Tables of the service."""


class SpeakerRow(Base):
    """One enrolled person of one tenant."""

    __tablename__ = "speakers"
    __table_args__ = (
        Index("ix_speakers_tenant_speaker", "tenant", "speaker_id", unique=True),
        Index("ix_speakers_tenant_revision", "tenant", "revision", "id"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    speaker_id: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    # The tenant's when this speaker was last changed.
    revision: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    enrolments: Mapped[list[EnrolmentRow]] = relationship(cascade="all, delete-orphan", order_by="EnrolmentRow.id")


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


class RevisionRow(Base):
    """How often a tenant's speakers were changed. Whoever changes them holds its row until that is committed, so that
    revisions become visible in their order."""

    __tablename__ = "revisions"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger)


class SpaceRow(Base):
    """Which network a space's embeddings are of: what it makes of a signal that never changes, as an embedding."""

    __tablename__ = "spaces"

    model_name: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_version: Mapped[int] = mapped_column(Integer, primary_key=True)
    mark: Mapped[bytes] = mapped_column(LargeBinary)
