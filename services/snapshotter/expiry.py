"""Expiry (S2): due snapshots are found by index and deleted by ordinary operations.

These are asked for in pages, some hundred snapshots in a transaction of few statements. Nothing is
waited for: a snapshot or server that somebody else is at has its turn in the next tick, and one
whose deletion failed after ten minutes.
"""

from datetime import timedelta
from typing import Any

import structlog
from celery import shared_task
from sqlalchemy import select, update

from shared import events
from shared.commands import DeleteSnapshot
from shared.database import now, reading, transaction
from shared.models import Operation, Server, Snapshot
from shared.operations.admission import Admitted
from shared.operations.outbox import flush_if_possible
from shared.operations.pages import PAGE, all_but_broken
from shared.operations.submit import queue
from shared.settings import settings

log = structlog.get_logger()

TRY_AGAIN = timedelta(minutes=10)
"""After a deletion that failed."""


@shared_task(name="snapshotter.expire_due")
def expire_due() -> None:
    """Beat's tick. Running it twice, or twice at once, deletes each snapshot once."""
    warn_of_expiry()
    submit_due()
    flush_if_possible()


def warn_of_expiry() -> int:
    """Send `snapshot.expiring` once for each snapshot whose end is near; returns how many."""
    warned = 0
    while page := _warn():
        warned += page
    return warned


def _warn() -> int:
    """The same for at most a page of them."""
    row: Any = Snapshot
    unwarned = row.deleted_at.is_(None) & row.warned_at.is_(None)
    near = select(row.id).where(unwarned, row.expires_at <= now() + settings().snapshot_warning)
    page = near.order_by(row.expires_at).limit(PAGE).with_for_update(skip_locked=True)
    with transaction() as session:
        warned = list(
            session.scalars(
                update(Snapshot)
                .where(row.id.in_(page), unwarned)
                .values(warned_at=now())
                .returning(Snapshot)
                .execution_options(synchronize_session=False)
            )
        )
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
    due = select(row.id).where(
        row.deleted_at.is_(None), row.expires_at <= now(), row.server_id.not_in(_asked_for())
    )
    with reading() as session:
        found = list(session.scalars(due.order_by(row.expires_at)))
    pages = [found[at : at + PAGE] for at in range(0, len(found), PAGE)]
    return sum(all_but_broken(page, _ask, _refused) for page in pages)


def _asked_for() -> Any:
    """Ids of servers whose snapshot's deletion is asked for already."""
    work: Any = Operation
    return select(work.server_id).where(
        work.kind == DeleteSnapshot.kind, work.state.in_(("queued", "running"))
    )


def _failed_lately() -> Any:
    """Ids of servers whose snapshot could not be deleted a moment ago; one of the future, by a
    clock that was ahead, puts nothing off."""
    work: Any = Operation
    moment = now()
    return select(work.server_id).where(
        work.kind == DeleteSnapshot.kind,
        work.state == "failed",
        work.finished_at > moment - TRY_AGAIN,
        work.finished_at <= moment,
    )


def _refused(snapshot_id: str) -> None:
    log.exception("expiry.refused", snapshot=snapshot_id)


def _ask(ids: list[str]) -> int:
    """One transaction: of these snapshots those that are free, locked with their servers, and a
    deletion of each."""
    row: Any = Snapshot
    server: Any = Server
    operation: Any = Operation
    free = (
        select(Snapshot, Server)
        .join(Server, server.id == row.server_id)
        .where(row.id.in_(ids), row.deleted_at.is_(None))
        .order_by(row.expires_at, row.id)
        .with_for_update(key_share=True, skip_locked=True, of=(Snapshot, Server))
    )
    with transaction() as session:
        found = list(session.execute(free))
        # Of two beats one has a snapshot; the other comes after it, and then sees the deletion.
        servers = [of.id for _, of in found]
        of_these = operation.server_id.in_(servers)
        passed_over = {
            *session.scalars(_asked_for().where(of_these)),
            *session.scalars(_failed_lately().where(of_these)),
        }
        wanted = [(snapshot, of) for snapshot, of in found if of.id not in passed_over]
        for snapshot, of in wanted:
            command = DeleteSnapshot(server=of.id, snapshot=snapshot.id, expired=True)
            queue(session, Admitted(of, command), "beat:expiry", None)
    return len(wanted)
