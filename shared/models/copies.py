"""The three copies: snapshots, images and clones; and the farms that clones are made in."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, text
from sqlmodel import Field, SQLModel

from shared.models.columns import CreatedAt, Document, Id, Moment


def UniqueBytes() -> Any:
    """What deleting the copy would free, as of `measured_at`; None while that is not known."""
    return Field(default=None, sa_type=BigInteger)


class Snapshot(SQLModel, table=True):
    """S1: the partial unique index allows one live snapshot per server."""

    __table_args__ = (
        Index(
            "snapshot_one_per_server",
            "server_id",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "snapshot_due",
            "expires_at",
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "snapshot_unwarned",
            "expires_at",
            sqlite_where=text("deleted_at IS NULL AND warned_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL AND warned_at IS NULL"),
        ),
    )

    id: str = Id("snp")
    server_id: str = Field(foreign_key="server.id")
    taken_at: datetime = Moment(nullable=False)
    expires_at: datetime = Moment(nullable=False)
    warned_at: datetime | None = Moment(default=None)
    with_memory: bool = False
    consistency: str
    way: str
    pause_ms: float | None = None
    bytes: int = Field(sa_type=BigInteger)
    unique_bytes: int | None = UniqueBytes()
    measured_at: datetime | None = Moment(default=None)
    description: str = ""
    deleted_at: datetime | None = Moment(default=None)


class Image(SQLModel, table=True):
    __table_args__ = (
        Index(
            "image_name_per_server",
            "server_id",
            "name",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "image_whole",
            "server_id",
            "created_at",
            sqlite_where=text("deleted_at IS NULL AND state = 'complete'"),
            postgresql_where=text("deleted_at IS NULL AND state = 'complete'"),
        ),
    )

    id: str = Id("img")
    name: str = Field(index=True)
    server_id: str = Field(foreign_key="server.id", index=True)
    created_at: datetime = CreatedAt()
    description: str = ""
    pinned: bool = False
    origin: str = "manual"
    schedule_id: str | None = Field(default=None, index=True)
    """The schedule whose rotation this image counts in."""
    state: str = "complete"
    consistency: str
    way: str
    pause_ms: float | None = None
    bytes: int = Field(sa_type=BigInteger)
    unique_bytes: int | None = UniqueBytes()
    measured_at: datetime | None = Moment(default=None)
    verified_at: datetime | None = Moment(default=None)
    verified_result: str | None = None
    left_out: list[dict[str, Any]] = Document(list)
    deleted_at: datetime | None = Moment(default=None)


class Farm(SQLModel, table=True):
    """What one `clone.create` makes: one clone or a hundred. Retried, it is the same farm."""

    __table_args__ = (
        Index(
            "farm_due",
            "due_at",
            sqlite_where=text("due_at IS NOT NULL"),
            postgresql_where=text("due_at IS NOT NULL"),
        ),
    )

    id: str = Id("frm")
    name: str = Field(index=True)
    """The pattern of its clones' names."""
    host: str
    server_id: str = Field(foreign_key="server.id")
    """The source, or whose snapshot or image it is: in its line stands what is done to the farm."""
    operation_id: str = Field(index=True)
    """Which made it first."""
    command: dict[str, Any] = Document(dict)
    """As it was admitted, so that what failed can be tried again."""
    created_at: datetime = CreatedAt()
    expires_in_h: float | None = None
    expires_at: datetime | None = Moment(default=None)
    """None while it lives without an end, or is not made yet."""
    warned_at: datetime | None = Moment(default=None)
    due_at: datetime | None = Moment(default=None)
    """When beat looks at it next: to warn of its end, at its end, to try again."""
    deleted_at: datetime | None = Moment(default=None)


class Clone(SQLModel, table=True):
    """One clone of a farm; `server_id` is the new server's once it is defined."""

    __table_args__ = (
        Index(
            "clone_name_taken",
            "host",
            "name",
            unique=True,
            sqlite_where=text("state IN ('queued', 'making')"),
            postgresql_where=text("state IN ('queued', 'making')"),
        ),
    )

    id: str = Id("cln")
    farm_id: str | None = Field(default=None, index=True)
    operation_id: str = Field(index=True)
    """Which makes or made it; the last one that tried."""
    host: str
    name: str = Field(index=True)
    server_id: str | None = Field(default=None, foreign_key="server.id")
    source_kind: str
    source_id: str
    created_at: datetime = CreatedAt()
    with_memory: bool = False
    way: str | None = None
    identity: dict[str, Any] = Document(dict)
    linked_to: list[str] = Document(list)
    """The files that its disks stand on, which it shares with the others of its operation."""
    files: list[str] | None = Document()
    """The files that were made for it: what goes with it, and nothing else. None: not known. Of a
    deleted one also those that its domain got later, which stay, where it stood on a base."""
    state: str = "queued"
    """queued · making · ready · failed · cancelled · deleted"""
    error: dict[str, Any] | None = Document()
