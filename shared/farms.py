"""What a farm's rows hold: planned with its first operation, planned again for a retry, its end.

Owned here: when a farm ends, and when beat looks at it. The work on its VMs is the cloner's.
"""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlmodel import Session

from shared import events
from shared.commands import CreateClones, RetryFarm
from shared.models import Clone, Farm, Operation

MAKING = (CreateClones.kind, RetryFarm.kind)
"""The kinds of operation that make clones."""
FAILED = ("failed", "cancelled")


def plan(session: Session, operation: Operation, command: CreateClones) -> None:
    """Add the farm that the operation makes, and its clones."""
    farm = Farm(
        name=command.name,
        host=operation.host,
        server_id=operation.server_id,
        operation_id=operation.id,
        command=operation.command,
        expires_in_h=command.expires_in_h,
    )
    session.add(farm)
    for name in command.names:
        session.add(
            Clone(
                farm_id=farm.id,
                operation_id=operation.id,
                host=operation.host,
                name=name,
                source_kind=command.source.kind,
                source_id=command.source.id,
                with_memory=command.with_memory,
            )
        )


def plan_again(session: Session, operation: Operation, farm_id: str) -> None:
    """Give the clones that failed, and no others, to another operation."""
    row: Any = Clone
    session.execute(
        update(Clone)
        .where(row.farm_id == farm_id, row.state.in_(FAILED))
        .values(operation_id=operation.id, state="queued", error=None)
    )


def failed(session: Session, farm: Farm) -> list[Clone]:
    row: Any = Clone
    query = select(Clone).where(row.farm_id == farm.id, row.state.in_(FAILED))
    return list(session.scalars(query.order_by(row.name)))


def settle(session: Session, operation: Operation, moment: datetime) -> None:
    """An operation that made clones has ended: none of them is left waiting, and the farm's time
    begins with the first that made any."""
    clone: Any = Clone
    farm: Any = Farm
    if operation.kind not in MAKING:
        return
    if operation.state != "succeeded":
        session.execute(
            update(Clone)
            .where(clone.operation_id == operation.id, clone.state.in_(("queued", "making")))
            .values(state=operation.state, error=operation.error)
        )
        return
    made = select(clone.farm_id).where(clone.operation_id == operation.id)
    endless = select(Farm).where(farm.id.in_(made), farm.expires_at.is_(None))
    for each in session.scalars(endless.with_for_update()):
        if each.expires_in_h is not None:
            let_end(each, each.expires_in_h, moment)


def let_end(farm: Farm, hours: float | None, moment: datetime) -> None:
    """Set the farm's end to so many hours from the moment, or take it away.

    Beat looks at it at once, and sees when its warning is due.
    """
    farm.expires_in_h = hours
    farm.expires_at = None if hours is None else moment + timedelta(hours=hours)
    farm.due_at = None if hours is None else moment
    farm.warned_at = None


def end_if_empty(session: Session, farm: Farm, moment: datetime, *, expired: bool = False) -> bool:
    """Mark a farm without clones as gone, and tell it."""
    row: Any = Clone
    left = select(row.id).where(row.farm_id == farm.id, row.state != "deleted").limit(1)
    if farm.deleted_at or session.scalars(left).first():
        return False
    farm.deleted_at, farm.due_at = moment, None
    fact = "farm.expired" if expired else "farm.deleted"
    events.emit(session, fact, farm.server_id, farm=farm.id, name=farm.name)
    return True
