"""Hosts, the libvirt domains they report, and the servers registered among these."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Index, text
from sqlmodel import Field, SQLModel

from shared.database import now
from shared.models.columns import CreatedAt, Document, Id, Moment

SILENCE = timedelta(seconds=90)
"""Workers report every 30 s; a host that has not for this long is silent."""


class Host(SQLModel, table=True):
    """A libvirt host; its workers write this row when they start and as things change."""

    name: str = Field(primary_key=True)
    created_at: datetime = CreatedAt()
    last_seen_at: datetime | None = Moment(default=None)
    problem: str | None = None
    """Why it cannot do its work, e.g. libvirtd does not answer; the inventory may be old then."""
    facts: dict[str, Any] = Document(dict)
    """libvirt, qemu, vault, reflink, free_bytes, total_bytes."""
    vault_id: str | None = None
    """The mark of its vault (`shared.mounted`); None until its workers have seen that."""
    draining_since: datetime | None = Moment(default=None)
    """Since when it takes no new work; None while it does."""

    @property
    def silent(self) -> bool:
        """Its workers are stopped, dead or cut off: nothing that is queued there starts."""
        return self.last_seen_at is None or now() - self.last_seen_at > SILENCE

    @property
    def answering(self) -> bool:
        return self.problem is None and not self.silent


class Domain(SQLModel, table=True):
    """A mirror of one libvirt domain, kept by the host's inventory."""

    host: str = Field(primary_key=True, foreign_key="host.name")
    uuid: str = Field(primary_key=True)
    name: str = Field(index=True)
    state: str
    vcpus: int
    memory_bytes: int = Field(sa_type=BigInteger)
    disks: list[dict[str, Any]] = Document(list)


class Server(SQLModel, table=True):
    """A domain registered with Triptych. Forgotten servers stay, for their images."""

    __table_args__ = (
        Index(
            "server_active_domain",
            "host",
            "domain_uuid",
            unique=True,
            sqlite_where=text("forgotten_at IS NULL"),
            postgresql_where=text("forgotten_at IS NULL"),
        ),
        Index(
            "server_held",
            "held_by",
            sqlite_where=text("held_by IS NOT NULL"),
            postgresql_where=text("held_by IS NOT NULL"),
        ),
    )

    id: str = Id("srv")
    name: str = Field(index=True)
    host: str = Field(foreign_key="host.name")
    domain_uuid: str
    created_at: datetime = CreatedAt()
    held_by: str | None = None
    """The operation of another server's line that is at work on it (`shared.operations.holds`)."""
    forgotten_at: datetime | None = Moment(default=None)
