"""The reaper: finds operations whose worker is gone, or whose wake-up was lost.

It only wakes: the worker that gets the message takes the operation over, clears up from
the journal, and goes on or gives up (runner).
"""

from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import and_, exists, or_, select
from sqlalchemy.orm import aliased

from shared import mounted
from shared.database import database_now, now, transaction
from shared.models import Host, Operation
from shared.models.hosts import SILENCE
from shared.operations import presence
from shared.operations.holds import is_held
from shared.operations.outbox import flush, wake
from shared.settings import settings

log = structlog.get_logger()

JUST_WOKEN = timedelta(seconds=5)
"""A message younger than this is taken to be on its way."""
WAKE_AGAIN_AFTER = timedelta(seconds=60)
"""A queued operation at the head of its server's line is woken again after this long:
its message may have been lost with the broker's memory."""


def _blocked() -> Any:
    """Whether a queued operation has to wait for another one of, or on, its server."""
    row: Any = Operation
    other: Any = aliased(Operation)
    ahead = or_(other.state == "running", and_(other.state == "queued", other.seq < row.seq))
    return or_(exists().where(other.server_id == row.server_id, ahead), is_held(row))


def reconcile() -> int:
    """Wake what nobody works on; returns how many. Raises when the broker is away.

    Nobody is woken on a host that is silent: its workers look for themselves when they start, and
    would first have to read all that was sent meanwhile.
    """
    row: Any = Operation
    host: Any = Host
    with transaction() as session:
        abandoned = and_(
            row.state == "running",
            or_(row.lease_expires_at.is_(None), row.lease_expires_at < database_now(session)),
        )
        forgotten = and_(
            row.state == "queued", row.woken_at < now() - WAKE_AGAIN_AFTER, ~_blocked()
        )
        silent = select(host.name).where(host.last_seen_at < now() - SILENCE)
        unseen = select(Operation).where(or_(abandoned, forgotten), row.host.not_in(silent))
        found = list(session.scalars(unseen))
        for operation in found:
            log.warning("operation.woken_again", operation=operation.id, state=operation.state)
            wake(session, operation)
    flush()
    return len(found)


def adopt_orphans(service: str) -> int:
    """At a worker's start: wake this host's operations whose worker process is dead, and
    those next in line, whose message may have died with a worker that had just taken it."""
    mounted.is_there()  # to be known when it is asked who lives
    row: Any = Operation
    mine = and_(row.service == service, row.host == settings().host)
    with transaction() as session:
        running = select(Operation).where(mine, row.state == "running")
        silent = row.woken_at < now() - JUST_WOKEN
        waiting = select(Operation).where(mine, row.state == "queued", silent, ~_blocked())
        orphans = [
            operation
            for operation in session.scalars(running)
            if operation.owner is None or presence.of(operation.owner) == "dead"
        ]
        orphans += session.scalars(waiting)
        for operation in orphans:
            log.warning("operation.orphaned", operation=operation.id, kind=operation.kind)
            wake(session, operation)
    return len(orphans)
