"""What of each copy is its own, and when that was measured"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = ("snapshot", "image")


def upgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table) as batch_op:
            batch_op.add_column(sa.Column("unique_bytes", sa.BigInteger(), nullable=True))
            batch_op.add_column(sa.Column("measured_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # Not by a copy of the table, which would lose the conditions of its partial indexes.
    for table in TABLES:
        with op.batch_alter_table(table, recreate="never") as batch_op:
            batch_op.drop_column("measured_at")
            batch_op.drop_column("unique_bytes")
