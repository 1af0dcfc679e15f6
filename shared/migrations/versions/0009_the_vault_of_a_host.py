"""Which vault is a host's"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("host", sa.Column("vault_id", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("host", "vault_id")
