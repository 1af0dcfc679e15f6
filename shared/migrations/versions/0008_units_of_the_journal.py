"""Which unit of its operation a step of the journal belongs to; what linked clones stand on"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("journal", sa.Column("unit", sa.String(), nullable=True))
    op.add_column("clone", sa.Column("linked_to", sa.JSON(), nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("clone", "linked_to")
    op.drop_column("journal", "unit")
