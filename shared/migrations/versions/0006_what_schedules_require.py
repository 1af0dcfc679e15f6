"""What a schedule's images must be; indexes by which fresh images and due warnings are found"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INDEXES = {
    "image_whole": (
        "image",
        ["server_id", "created_at"],
        "deleted_at IS NULL AND state = 'complete'",
    ),
    "snapshot_unwarned": ("snapshot", ["expires_at"], "deleted_at IS NULL AND warned_at IS NULL"),
}


def upgrade() -> None:
    with op.batch_alter_table("schedule") as batch_op:
        batch_op.add_column(
            sa.Column("require", sa.String(), nullable=False, server_default="complete")
        )
    for name, (table, columns, condition) in INDEXES.items():
        where = sa.text(condition)
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name, (table, _, _) in INDEXES.items():
        op.drop_index(name, table_name=table)
    # Not by a copy of the table, which the runs refer to.
    with op.batch_alter_table("schedule", recreate="never") as batch_op:
        batch_op.drop_column("require")
