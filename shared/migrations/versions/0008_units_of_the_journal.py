"""Which unit of its operation a step of the journal belongs to"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("journal", sa.Column("unit", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("journal", "unit")
