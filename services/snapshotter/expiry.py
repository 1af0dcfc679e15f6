"""Expiry (S2): due snapshots are found by index and deleted by an ordinary operation."""

from typing import Any

import structlog
from celery import shared_task
from sqlalchemy import select, update

from shared import events
from shared.commands import DeleteSnapshot
from shared.database import now, reading, transaction
from shared.models import Operation, Snapshot
from shared.operations.outbox import flush_if_possible
from shared.operations.patience import DATABASE_AWAY
from shared.operations.submit import submit
from shared.settings import settings

log = structlog.get_logger()


@shared_task(name="snapshotter.expire_due")
def expire_due() -> None:
    """Beat's tick. Running it twice, or twice at once, deletes each snapshot once."""
    warn_of_expiry()
    submit_due()
    flush_if_possible()


def warn_of_expiry() -> int:
    """Send `snapshot.expiring` once for each snapshot whose end is near; returns how many."""
    row: Any = Snapshot
    with transaction() as session:
        near = (
            update(Snapshot)
            .where(
                row.deleted_at.is_(None),
                row.warned_at.is_(None),
                row.expires_at <= now() + settings().snapshot_warning,
            )
            .values(warned_at=now())
            .returning(Snapshot)
        )
        warned = list(session.scalars(near))
        for snapshot in warned:
            events.emit(
                session,
                "snapshot.expiring",
                snapshot.server_id,
                snapshot=snapshot.id,
                expires_at=snapshot.expires_at.isoformat(),
            )
    return len(warned)


def submit_due() -> int:
    """Ask for the deletion of each snapshot past its time; returns how many were asked for.

    It stands in its server's line: what holds the snapshot at that time ends first. One deletion
    that is refused, or waits, keeps no other from being asked for.
    """
    row: Any = Snapshot
    with reading() as session:
        due = select(row.id).where(
            row.deleted_at.is_(None),
            row.expires_at <= now(),
            row.server_id.not_in(_being_deleted()),
        )
        found = list(session.scalars(due.order_by(row.expires_at)))
    asked = 0
    for snapshot in found:
        try:
            asked += _ask(snapshot)
        except DATABASE_AWAY:
            raise
        except Exception:
            log.exception("expiry.refused", snapshot=snapshot)
    return asked


def _being_deleted() -> Any:
    """Ids of servers whose snapshot's deletion is asked for already."""
    work: Any = Operation
    return select(work.server_id).where(
        work.kind == DeleteSnapshot.kind, work.state.in_(("queued", "running"))
    )


def _ask(snapshot_id: str) -> bool:
    row: Any = Snapshot
    with transaction() as session:
        free = select(Snapshot).where(
            row.id == snapshot_id,
            row.deleted_at.is_(None),
            row.server_id.not_in(_being_deleted()),
        )
        # Of two beats one has it; the other comes after it, and then finds the deletion.
        locked = free.with_for_update(skip_locked=True)
        snapshot = session.scalars(locked).one_or_none()
        if snapshot is None or session.scalars(free).first() is None:
            return False
        command = DeleteSnapshot(server=snapshot.server_id, snapshot=snapshot.id, expired=True)
        submit(session, command, requested_by="beat:expiry")
    return True
