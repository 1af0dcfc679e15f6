"""A host can be drained"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("host") as batch_op:
        batch_op.add_column(sa.Column("draining_since", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # Never by a copy of the table, batch mode's way on SQLite: dropping the original would break
    # the foreign keys of the servers and domains that refer to it.
    with op.batch_alter_table("host", recreate="never") as batch_op:
        batch_op.drop_column("draining_since")
