"""When runs of schedules start, until when, and for which slots a skipped one stands"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOMENTS = ("first_slot", "start_at", "give_up_at")


def upgrade() -> None:
    with op.batch_alter_table("schedule") as batch_op:
        batch_op.add_column(sa.Column("start_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.drop_index("ix_schedule_next_run_at")
        batch_op.create_index("schedule_due", ["kind", "start_at", "id"])
    op.execute("UPDATE schedule SET start_at = next_run_at")
    with op.batch_alter_table("schedule_run") as batch_op:
        for name in MOMENTS:
            batch_op.add_column(sa.Column(name, sa.DateTime(timezone=True), nullable=True))
        running = sa.text("state = 'running'")
        batch_op.create_index(
            "schedule_run_waiting", ["give_up_at"], sqlite_where=running, postgresql_where=running
        )


def downgrade() -> None:
    # Not by a copy of the tables, which would lose the conditions of partial indexes.
    op.drop_index("schedule_run_waiting", "schedule_run")
    with op.batch_alter_table("schedule_run", recreate="never") as batch_op:
        for name in MOMENTS:
            batch_op.drop_column(name)
    op.drop_index("schedule_due", "schedule")
    op.create_index("ix_schedule_next_run_at", "schedule", ["next_run_at"])
    with op.batch_alter_table("schedule", recreate="never") as batch_op:
        batch_op.drop_column("start_at")
