"""Alembic's entry: runs the revisions on the application's own engine."""

from alembic import context
from sqlmodel import SQLModel

from shared import models  # noqa: F401  fills the metadata
from shared.database import engine

with engine().connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()
