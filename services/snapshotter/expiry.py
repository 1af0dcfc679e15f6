"""Expiry (S2): due snapshots are found by index and deleted by an ordinary operation."""

from typing import Any

import structlog
from celery import shared_task
from sqlalchemy import select, update

from shared import errors, events
from shared.commands import DeleteSnapshot
from shared.database import now, transaction
from shared.models import Operation, Snapshot
from shared.operations.outbox import flush_if_possible
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
    """Ask for the deletion of each snapshot past its time; returns how many were asked for."""
    row: Any = Snapshot
    work: Any = Operation
    asked = 0
    with transaction() as session:
        being_deleted = select(work.server_id).where(
            work.kind == DeleteSnapshot.kind, work.state.in_(("queued", "running"))
        )
        due = select(Snapshot).where(
            row.deleted_at.is_(None),
            row.expires_at <= now(),
            row.server_id.not_in(being_deleted),
        )
        for snapshot in list(session.scalars(due)):
            command = DeleteSnapshot(server=snapshot.server_id, snapshot=snapshot.id, expired=True)
            try:
                submit(session, command, requested_by="beat:expiry")
            except errors.TriptychError as error:  # the others expire all the same
                log.error("expiry.refused", snapshot=snapshot.id, code=error.code)
            else:
                asked += 1
    return asked
