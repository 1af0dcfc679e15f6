"""Measuring what of each copy is its own: the bytes that deleting it would free.

That changes without anybody touching the copy: the live disk is written, a neighbour goes. So
every copy has its turn once in a while, and those of a server sooner where one of its copies came
or went. What a copy shares is asked of the file system, extent by extent; the measurer rests
twenty times as long as each answer took.
"""

import contextlib
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import func, or_, select, update
from sqlmodel import Session

from shared.database import now, reading, transaction
from shared.disks.beside import NVRAM_FILE, TPM_FILE
from shared.disks.extents import unique_bytes
from shared.manifest import DEFINITION, MANIFEST, NOTES
from shared.models import Image, Server, Snapshot
from shared.settings import settings
from shared.tending.tender import Tender
from shared.vault import Vault

STALE = timedelta(hours=1)
"""So old a number is measured anew, whatever happened."""
SETTLED = timedelta(seconds=10)
"""So long after a copy came or went, its files are there or gone and the blocks counted anew."""
_REST = 20
_BESIDE = (MANIFEST, DEFINITION, NOTES, NVRAM_FILE, TPM_FILE)
_MODELS: dict[str, Any] = {"snapshot": Snapshot, "image": Image}


class Measurer(Tender):
    """Keeps `unique_bytes` of this host's snapshots or images true."""

    def __init__(self, kind: Literal["snapshot", "image"]) -> None:
        super().__init__(f"{kind}-measurer")
        self.kind = kind

    def turn(self) -> None:
        with reading() as session:
            waiting = due(session, self.kind, now())
        vault = Vault(settings().vault)
        for copy_id, server_id in waiting:
            if self.stopping():
                return
            asked, started = now(), time.monotonic()
            found = unique_of(vault.folder(self.kind, server_id, copy_id))
            row = _MODELS[self.kind]
            with transaction() as session:
                session.execute(
                    update(row)
                    .where(row.id == copy_id)
                    .values(unique_bytes=found, measured_at=asked)
                )
            self._stopped.wait((time.monotonic() - started) * _REST)


def unique_of(folder: Path) -> int | None:
    """What deleting this copy would free, some KiB beside its disks aside; None where it is not
    there."""
    with contextlib.suppress(OSError):  # gone, or on its way out
        return sum(unique_bytes(path) for path in folder.iterdir() if _counts(path.name))
    return None


def _counts(name: str) -> bool:
    """Whether the copy's `bytes` have that file in them, so that the two can be compared."""
    return name not in _BESIDE and not name.startswith(".")


def due(session: Session, kind: str, moment: datetime) -> list[tuple[str, str]]:
    """The copies of this host to be measured, with their servers; the most urgent first."""
    row = _MODELS[kind]
    query = (
        select(row.id, row.server_id, row.measured_at)
        .join(Server, Server.id == row.server_id)
        .where(Server.host == settings().host, row.deleted_at.is_(None))  # type: ignore[arg-type]
    )
    changed = _changes(session, moment)
    long_ago = moment - STALE
    waiting = []
    for copy_id, server_id, measured_at in session.execute(query):
        change = changed.get(server_id)
        if (
            measured_at is None
            or measured_at < long_ago
            or (change and measured_at < change + SETTLED <= moment)
        ):
            waiting.append((measured_at is not None, measured_at or moment, copy_id, server_id))
    return [(copy_id, server_id) for *_, copy_id, server_id in sorted(waiting)]


def _changes(session: Session, moment: datetime) -> dict[str, datetime]:
    """When a copy of each server came or went last; what is older than STALE does not matter."""
    found: dict[str, datetime] = {}
    since = moment - STALE - SETTLED
    for row, made_at in ((Snapshot, Snapshot.taken_at), (Image, Image.created_at)):
        gone_at: Any = row.deleted_at
        made: Any = made_at
        query = (
            select(row.server_id, func.max(made), func.max(gone_at))  # type: ignore[call-overload]
            .where(or_(made > since, gone_at > since))
            .group_by(row.server_id)
        )
        for server_id, *moments in session.execute(query):
            moments = [each for each in (*moments, found.get(server_id)) if each]
            found[server_id] = max(moments)
    return found
