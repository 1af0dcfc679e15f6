"""Alembic's entry: runs the revisions on the application's own engine."""

from alembic import context
from sqlalchemy import text
from sqlmodel import SQLModel

from shared import models  # noqa: F401  fills the metadata
from shared.database import engine, unhurried

# Whoever comes second waits, and then finds nothing to do: on SQLite the transaction itself
# keeps others out, on PostgreSQL a lock with a number that means only this.
with engine().begin() as connection:
    unhurried(connection)
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7472697074796368)"))
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()
