"""Operations, their journal, and the outbox that wakes workers.

The operation row is the truth; a queue message is only a wake-up.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, text
from sqlmodel import Field, SQLModel

from shared.ids import new_id
from shared.models.columns import CreatedAt, Document, Moment


class Operation(SQLModel, table=True):
    """`seq` gives the order within a server; the partial unique index is what keeps
    work on one server serial, whatever two workers believe (E3)."""

    __table_args__ = (
        Index(
            "operation_one_running_per_server",
            "server_id",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index("operation_by_state", "state", "host", "service"),
        Index("operation_by_server", "server_id", "state", "seq"),
    )

    seq: int | None = Field(default=None, primary_key=True)
    id: str = Field(default_factory=lambda: new_id("op"), unique=True, nullable=False)
    kind: str
    service: str
    host: str
    server_id: str = Field(foreign_key="server.id")
    command: dict[str, Any] = Document(dict)
    requested_by: str
    idempotency_key: str | None = Field(default=None, unique=True)
    request_hash: str | None = None

    state: str = "queued"
    """queued · running · succeeded · failed · cancelled"""
    phase: str = "queued"
    progress: int = 0
    bytes_done: int = Field(default=0, sa_type=BigInteger)
    bytes_total: int = Field(default=0, sa_type=BigInteger)
    attempt: int = 0
    owner: str | None = None
    lease_expires_at: datetime | None = Moment(default=None)
    cancel_requested_at: datetime | None = Moment(default=None)
    committed: bool = False
    """Past the point of no return: a crash from here on is finished, not undone."""
    error: dict[str, Any] | None = Document()
    result: dict[str, Any] | None = Document()
    undo: dict[str, Any] | None = Document()
    """What `POST …/undo` needs to put back what this operation replaced."""
    undo_until: datetime | None = Moment(default=None)
    created_at: datetime = CreatedAt()
    woken_at: datetime = CreatedAt()
    started_at: datetime | None = Moment(default=None)
    finished_at: datetime | None = Moment(default=None)


class JournalEntry(SQLModel, table=True):
    """A step written down before it is taken: what undoes it (`side` undo), or, once the
    operation is committed, what is left to do (`side` redo)."""

    __tablename__ = "journal"
    __table_args__ = ({"sqlite_autoincrement": True},)

    seq: int | None = Field(default=None, primary_key=True)
    operation_id: str = Field(index=True)
    side: str
    action: str
    arguments: dict[str, Any] = Document(dict)
    unit: str | None = None
    """The part of the operation that the step belongs to, where it has parts that are undone each
    on its own."""


class OutboxMessage(SQLModel, table=True):
    """A Celery message that must go out; deleted once the broker has it.

    No number is given twice: of two who send the same message, the second to delete it by
    its number would else delete, unsent, whatever had got that number since.
    """

    __tablename__ = "outbox"
    __table_args__ = ({"sqlite_autoincrement": True},)

    seq: int | None = Field(default=None, primary_key=True)
    task: str
    queue: str
    arguments: dict[str, Any] = Document(dict)
    created_at: datetime = CreatedAt()
