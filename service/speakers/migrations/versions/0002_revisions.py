"""A number that grows with every change of a tenant's speakers, so that what holds them in memory can follow."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "revisions",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
    )
    op.add_column("speakers", sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_speakers_tenant_revision", "speakers", ["tenant", "revision", "id"])
    op.execute("INSERT INTO revisions (tenant, revision) SELECT DISTINCT tenant, 1 FROM speakers")


def downgrade() -> None:
    op.drop_index("ix_speakers_tenant_revision", "speakers")
    op.drop_column("speakers", "revision")
    op.drop_table("revisions")
