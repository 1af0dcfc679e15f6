"""Claiming by conditional update: one row changed, or somebody else has it."""

from datetime import timedelta
from typing import Any

from sqlalchemy import and_, exists, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased
from sqlmodel import Session

from shared import lookups
from shared.database import database_now, now, transaction
from shared.models import Operation
from shared.operations import presence
from shared.settings import settings


def claim(operation_id: str, owner: str) -> Operation | None:
    """Take a queued operation that is the first of its server, or None.

    One operation per server runs at a time, first come first served (E3). The condition
    keeps the order; the partial unique index keeps the promise where two claims race.
    """
    other: Any = aliased(Operation)
    mine: Any = Operation
    in_the_way = exists().where(
        other.server_id == mine.server_id,
        or_(
            other.state == "running",
            and_(other.state == "queued", other.seq < mine.seq),
        ),
    )
    try:
        with transaction() as session:
            return _take(session, operation_id, owner, and_(mine.state == "queued", ~in_the_way))
    except IntegrityError:
        return None


def take_over(operation_id: str, owner: str) -> Operation | None:
    """Take a running operation whose worker is gone (dead, or its lease expired), or None."""
    mine: Any = Operation
    with transaction() as session:
        current = lookups.operation(session, operation_id)
        if current.state != "running":
            return None
        expired = or_(
            mine.lease_expires_at.is_(None), mine.lease_expires_at < database_now(session)
        )
        if current.owner and presence.is_dead(current.owner):
            expired = mine.owner == current.owner
        return _take(session, operation_id, owner, and_(mine.state == "running", expired))


def _take(session: Session, operation_id: str, owner: str, condition: Any) -> Operation | None:
    mine: Any = Operation
    claimed = session.execute(
        update(Operation)
        .where(mine.id == operation_id, condition)
        .values(
            state="running",
            phase="starting",
            owner=owner,
            lease_expires_at=database_now(session) + timedelta(seconds=settings().lease),
            started_at=now(),
        )
    )
    if claimed.rowcount != 1:  # type: ignore[attr-defined]
        return None
    query = select(Operation).where(mine.id == operation_id)
    return session.scalars(query).one()
