"""Which network a space's embeddings are of. Spaces that have profiles already are those of whoever asks first."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "spaces",
        sa.Column("model_name", sa.String(64), primary_key=True),
        sa.Column("model_version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("mark", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("spaces")
