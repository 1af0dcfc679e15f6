"""Claiming by conditional update: one row changed, or somebody else has it.

Whoever claimed an operation may lose it again. `held` is the fence: every later change to the
operation, its journal or its outcome goes through it, so that a worker which was given up for
dead and comes back changes nothing any more.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import and_, bindparam, exists, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased
from sqlmodel import Session

from shared import errors, lookups
from shared.database import database_now, from_now, transaction
from shared.models import Operation
from shared.operations import presence
from shared.operations.holds import is_held
from shared.settings import settings

_mine: Any = Operation
_other: Any = aliased(Operation)
# Built once: an alias and its conditions cost more than the statement takes to run.
_FIRST_OF_ITS_SERVER = and_(
    _mine.state == "queued",
    ~is_held(_mine),
    ~exists().where(
        _other.server_id == _mine.server_id,
        or_(
            _other.state == "running",
            and_(_other.state == "queued", _other.seq < _mine.seq),
        ),
    ),
)
_HELD = (
    select(Operation)
    .where(_mine.id == bindparam("id"), _mine.owner == bindparam("owner"), _mine.state == "running")
    .with_for_update()
)
STALLED = 5
"""A worker of this host that is silent but alive (the database is away, the disk is slow), or may
be (its vault is), keeps its operation for this many leases: two workers on one server's disks are
the greater evil."""


def claim(operation_id: str, owner: str) -> Operation | None:
    """Take a queued operation that is the first of its server, which nobody holds, or None.

    One operation per server runs at a time, first come first served (E3). The condition
    keeps the order; the partial unique index keeps the promise where two claims race.
    """
    next_attempt = _mine.attempt + 1
    try:
        with transaction(durable=False) as session:
            return _take(session, operation_id, owner, _FIRST_OF_ITS_SERVER, attempt=next_attempt)
    except IntegrityError:
        return None


def take_over(operation_id: str, owner: str) -> Operation | None:
    """Take a running operation whose worker is gone (dead, or silent for too long), or None."""
    with transaction() as session:
        current = lookups.operation(session, operation_id)
        if current.state != "running":
            return None
        ours = current.owner is not None and presence.is_ours(current.owner)
        known = presence.of(current.owner) if current.owner else "unknown"
        patience = timedelta(seconds=settings().lease * STALLED if ours else 0)
        gone: Any = _mine.lease_expires_at < database_now(session) - patience
        if known == "dead":
            gone = _mine.owner == current.owner
        return _take(session, operation_id, owner, and_(_mine.state == "running", gone))


def held(session: Session, operation_id: str, owner: str) -> Operation:
    """The operation, locked for this transaction; raises LeaseLost unless it is still `owner`'s."""
    found = session.scalars(_HELD, {"id": operation_id, "owner": owner}).one_or_none()
    if found is None:
        raise errors.LeaseLost(f"Operation {operation_id} was taken over by another worker.")
    return found


def _take(
    session: Session, operation_id: str, owner: str, condition: Any, **values: Any
) -> Operation | None:
    claimed = session.scalars(
        update(Operation)
        .where(_mine.id == operation_id, condition)
        .values(
            state="running",
            phase="starting",
            owner=owner,
            lease_expires_at=from_now(settings().lease),
            started_at=from_now(0),
            **values,
        )
        .returning(Operation)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    return claimed.one_or_none()
