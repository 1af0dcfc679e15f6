"""Holds: an operation at work on other servers than the one in whose line it stands.

What is done to a farm is done to many servers at once. Each of them is held for it: its own
line stands still until the operation has ended, however that comes. A server that has work of
its own queued or running is not held: that comes first.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import exists, select, update
from sqlmodel import Session

from shared.commands import DeleteClone, DeleteFarm, StartFarm, StopFarm
from shared.models import Operation, Server

HOLDING = (StartFarm.kind, StopFarm.kind, DeleteFarm.kind, DeleteClone.kind)


def is_held(operation: Any) -> Any:
    """Whether the server of an operation (a class, or an alias of it) is held, as a condition."""
    server: Any = Server
    return exists().where(server.id == operation.server_id, server.held_by.is_not(None))


def hold(session: Session, operation_id: str, servers: Iterable[str]) -> dict[str, str]:
    """Hold those that are free; returns the others, each with the operation that is in the way.

    Nothing that is submitted later begins before `release`: it refers to the server's row, which
    is locked here, and is then seen, or sees the hold when it is claimed.
    """
    server: Any = Server
    row: Any = Operation
    wanted = select(Server).where(server.id.in_(set(servers))).order_by(server.id)
    current = wanted.with_for_update().execution_options(populate_existing=True)
    found = list(session.scalars(current))
    ahead = (
        select(row.server_id, row.id)
        .where(row.server_id.in_([each.id for each in found]), row.id != operation_id)
        .where(row.state.in_(("queued", "running")))
        .order_by(row.state, row.seq.desc())  # what runs, else what is next, is kept below
    )
    busy: dict[str, str] = {each.server_id: each.id for each in session.execute(ahead)}
    for each in found:
        if each.held_by is None and each.id not in busy:
            each.held_by = operation_id
        elif each.held_by == operation_id:  # by an earlier attempt: what is queued came later
            busy.pop(each.id, None)
        elif each.held_by:
            busy[each.id] = each.held_by
    return busy


def release(session: Session, operation: Operation) -> list[str]:
    """Let go of all that the operation holds; the servers, whose lines may go on now."""
    if operation.kind not in HOLDING:
        return []
    row: Any = Server
    held = update(Server).where(row.held_by == operation.id).values(held_by=None)
    return sorted(session.scalars(held.returning(row.id)))
