"""Farms, what was made for each clone, and servers that another's operation is at work on"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

MOMENTS = ("expires_at", "warned_at", "due_at", "deleted_at")
PARTIAL = {
    "farm_due": ("farm", "due_at", "due_at IS NOT NULL"),
    "server_held": ("server", "held_by", "held_by IS NOT NULL"),
}


def upgrade() -> None:
    op.create_table(
        "farm",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("server_id", sa.String(), nullable=False),
        sa.Column("operation_id", sa.String(), nullable=False),
        sa.Column("command", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_in_h", sa.Float(), nullable=True),
        *(sa.Column(name, sa.DateTime(timezone=True), nullable=True) for name in MOMENTS),
        sa.ForeignKeyConstraint(["server_id"], ["server.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    for column in ("name", "operation_id"):
        op.create_index(f"ix_farm_{column}", "farm", [column])
    with op.batch_alter_table("clone") as batch_op:
        batch_op.add_column(sa.Column("farm_id", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("files", sa.JSON(), nullable=True))
    op.create_index("ix_clone_farm_id", "clone", ["farm_id"])
    with op.batch_alter_table("server") as batch_op:
        batch_op.add_column(sa.Column("held_by", sa.String(), nullable=True))
    for name, (table, column, condition) in PARTIAL.items():
        where = sa.text(condition)
        op.create_index(name, table, [column], sqlite_where=where, postgresql_where=where)
    _farms_of_the_clones_that_there_are()


def _farms_of_the_clones_that_there_are() -> None:
    """Each operation that made clones gets its farm, which lives without an end."""
    columns = ("id", "name", "host", "server_id", "operation_id", "command", "created_at")
    farm = sa.table("farm", *map(sa.column, columns))
    work = sa.table(
        "operation",
        sa.column("command", sa.JSON),
        *map(sa.column, ("id", "kind", "host", "server_id", "created_at")),
    )
    found = sa.select(
        sa.literal("frm").concat(sa.func.substr(work.c.id, 3)),
        work.c.command["name"].as_string(),
        work.c.host,
        work.c.server_id,
        work.c.id,
        work.c.command,
        work.c.created_at,
    ).where(work.c.kind == "clone.create")
    op.execute(farm.insert().from_select(columns, found))
    op.execute(
        "UPDATE clone SET farm_id = (SELECT id FROM farm WHERE farm.operation_id = "
        "clone.operation_id)"
    )
    op.execute(
        "UPDATE farm SET deleted_at = created_at WHERE NOT EXISTS (SELECT 1 FROM clone "
        "WHERE clone.farm_id = farm.id AND clone.state <> 'deleted')"
    )


def downgrade() -> None:
    # Not by a copy of the tables, which would lose the conditions of partial indexes.
    for name, (table, _, _) in PARTIAL.items():
        op.drop_index(name, table_name=table)
    with op.batch_alter_table("server", recreate="never") as batch_op:
        batch_op.drop_column("held_by")
    op.drop_index("ix_clone_farm_id", "clone")
    with op.batch_alter_table("clone", recreate="never") as batch_op:
        batch_op.drop_column("files")
        batch_op.drop_column("farm_id")
    op.drop_table("farm")
