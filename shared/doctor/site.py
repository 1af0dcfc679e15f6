"""What the doctor's checks look at, and who is at work on it: nothing of theirs is a finding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared.database import database_now, reading
from shared.hypervisor.inventory import DomainFacts
from shared.models import Domain as DomainRow
from shared.models import JournalEntry, Operation, Server
from shared.operations import presence
from shared.vault import Vault


@dataclass(frozen=True)
class Site:
    """One host. Reading; it changes nothing."""

    host: str
    uri: str
    vault: Vault
    domains: list[DomainFacts] | None
    """What libvirt has; None while it is away."""

    def servers(self) -> list[Server]:
        """The registered servers of this host."""
        row: Any = Server
        with reading() as session:
            query = select(Server).where(row.host == self.host, row.forgotten_at.is_(None))
            return list(session.scalars(query.order_by(row.id)))

    def running(self) -> list[Operation]:
        row: Any = Operation
        with reading() as session:
            query = select(Operation).where(row.host == self.host, row.state == "running")
            return list(session.scalars(query.order_by(row.seq)))

    def lost(self) -> list[Operation]:
        """The running operations that nobody is at: their worker is gone."""
        return [each for each in self.running() if is_lost(each)]

    def disk_files(self) -> set[Path]:
        """The files that domains have for disks, as libvirt says and as it said last."""
        row: Any = DomainRow
        with reading() as session:
            known = session.scalars(select(row.disks).where(row.host == self.host))
            paths = [disk.get("path") for disks in known for disk in disks]
        paths += [disk.path for domain in self.domains or [] for disk in domain.disks]
        return {Path(path).resolve() for path in paths if path}

    def disks_in(self, folder: Path) -> list[str]:
        """The files in a directory that a domain has for a disk, by name."""
        disks = self.disk_files()
        return sorted(each.name for each in folder.iterdir() if each.resolve() in disks)

    def busy(self) -> set[str]:
        """The servers, by id, that a worker is at."""
        return {each.server_id for each in self.running() if not is_lost(each)}


def is_lost(operation: Operation) -> bool:
    """Whether a running operation's worker is gone, or it was left by one that could not undo it.

    One that was handed on with nothing left to undo only waits for a worker. Asked after the row
    was read, so the row is read once more: the operation may have ended in between.
    """
    if operation.owner is None:
        return bool(steps(operation))
    seen = presence.left(operation.owner)
    known = presence.of(operation.owner, sweep=False)
    with reading() as session:
        current = session.get(Operation, operation.seq)
        if current is None or (current.state, current.owner) != ("running", operation.owner):
            return False
        # Of this host while it had another name; or of another host whose name we were given.
        if known == "unknown" or not seen:
            lease = current.lease_expires_at
            return lease is None or lease < database_now(session)
        return known == "dead"


def steps(operation: Operation, side: str | None = None) -> list[JournalEntry]:
    """What the journal holds of it, oldest first: `undo` before its commit, `redo` after it."""
    row: Any = JournalEntry
    with reading() as session:
        query = select(JournalEntry).where(row.operation_id == operation.id)
        if side:
            query = query.where(row.side == side)
        return list(session.scalars(query.order_by(row.seq)))


def spoken_for(session: Session, argument: str) -> set[str]:
    """The values of one argument of all journal entries: what an operation has yet to clear up.

    To be asked after the thing itself was seen: the entry is written before the thing is made,
    and struck off after it is gone or kept.
    """
    entries = session.scalars(select(JournalEntry))
    return {each.arguments[argument] for each in entries if argument in each.arguments}
