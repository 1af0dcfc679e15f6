"""The end of farms that were given one: due farms are found by index, warned of, and deleted.

Beat looks at a farm when its `due_at` has come, and sets that on: to the warning, to the end, and
where the deletion left something, to the next try.
"""

from datetime import datetime, timedelta
from typing import Any

import structlog
from celery import shared_task
from sqlalchemy import select
from sqlmodel import Session

from shared import events
from shared.commands import DeleteFarm
from shared.database import now, reading, transaction
from shared.models import Farm, Operation
from shared.operations.outbox import flush_if_possible
from shared.operations.patience import DATABASE_AWAY
from shared.operations.submit import submit
from shared.settings import settings

log = structlog.get_logger()

TRY_AGAIN = timedelta(minutes=10)
"""After a deletion that could not delete all: a clone had work of its own, libvirt refused."""
SHARE = 4
"""The warning comes at the earliest when a quarter of the farm's time is left."""
BATCH = 100


@shared_task(name="cloner.expire_due")
def expire_due() -> None:
    """Beat's tick. Running it twice, or twice at once, warns of and deletes each farm once."""
    look_at_due()
    flush_if_possible()


def look_at_due() -> int:
    """Look at each farm that is due, until none is; returns how many deletions were asked for.

    One that is refused keeps no other from its turn.
    """
    row: Any = Farm
    asked = 0
    seen: set[str] = set()
    while True:
        with reading() as session:
            due = select(row.id).where(row.due_at <= now(), row.id.not_in(seen))
            found = list(session.scalars(due.order_by(row.due_at).limit(BATCH)))
        if not found:
            return asked
        for farm_id in found:
            try:
                asked += _look(farm_id)
            except DATABASE_AWAY:
                raise
            except Exception:
                log.exception("farm.expiry_refused", farm=farm_id)
        seen |= set(found)


def _look(farm_id: str) -> bool:
    """Warn of the farm's end, or ask for its deletion, if it is time; True for the latter.

    Where the warning comes late, as after an outage, so does the end: half of the time between
    them is left at least.
    """
    row: Any = Farm
    asked = False
    with transaction() as session:
        due = select(Farm).where(row.id == farm_id, row.due_at <= now())
        # Of two beats one has it; the other comes after it, and then it is not due any more.
        farm = session.scalars(due.with_for_update(skip_locked=True)).one_or_none()
        if farm is None or farm.expires_at is None or farm.expires_in_h is None:
            return False
        moment, end = now(), farm.expires_at
        notice = min(settings().farm_warning, timedelta(hours=farm.expires_in_h) / SHARE)
        farm.due_at = end - notice
        if moment >= farm.due_at:
            if farm.warned_at is None:
                farm.expires_at = end = max(end, moment + notice / 2)
                _warn(session, farm, moment)
            farm.due_at = end
        if moment >= end:
            farm.due_at = moment + TRY_AGAIN
            asked = _delete(session, farm)
    return asked


def _warn(session: Session, farm: Farm, moment: datetime) -> None:
    farm.warned_at = moment
    events.emit(
        session,
        "farm.expiring",
        farm.server_id,
        farm=farm.id,
        name=farm.name,
        expires_at=farm.expires_at and farm.expires_at.isoformat(),
    )


def _delete(session: Session, farm: Farm) -> bool:
    """Ask for it, unless that was done: then it waits in the line of the farm's source."""
    row: Any = Operation
    unfinished = select(row.command).where(
        row.server_id == farm.server_id,
        row.state.in_(("queued", "running")),
        row.kind == DeleteFarm.kind,
    )
    if farm.id in {each["farm"] for each in session.scalars(unfinished)}:
        return False
    submit(session, DeleteFarm(farm=farm.id, expired=True), requested_by="beat:expiry")
    return True
