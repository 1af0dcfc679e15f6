"""Cancelling: at once while queued, within 5 s while running (E5)."""

from typing import Any

from sqlalchemy import update
from sqlmodel import Session

from shared import errors, lookups
from shared.database import now
from shared.models import Operation
from shared.operations.finish import finish


def cancel(session: Session, operation_id: str) -> Operation:
    """Ask for the operation's end; raises NotCancellable when it is past that."""
    row: Any = Operation
    operation = lookups.operation(session, operation_id)
    claimed_from_queue = session.execute(
        update(Operation)
        .where(row.id == operation_id, row.state == "queued")
        .values(state="cancelled")
    )
    if claimed_from_queue.rowcount == 1:  # type: ignore[attr-defined]
        session.refresh(operation)
        cancelled = errors.Cancelled("Cancelled before it started; nothing was touched.")
        finish(
            session,
            operation,
            "cancelled",
            {"code": cancelled.code, "message": cancelled.detail},
        )
        return operation
    # Conditional like the runner's commit, which looks for it: one of the two comes first.
    session.execute(
        update(Operation)
        .where(
            row.id == operation_id,
            row.state == "running",
            row.committed.is_(False),
            row.cancel_requested_at.is_(None),
        )
        .values(cancel_requested_at=now())
    )
    session.refresh(operation)
    accepted = operation.state == "running" and operation.cancel_requested_at
    if operation.state != "cancelled" and not accepted:
        raise errors.NotCancellable(
            f"Operation {operation.id} has {operation.state if operation.finished_at else 'done'}"
            " its work already; nothing was changed. A revert or restore can be undone with "
            "`triptych operation undo`.",
            operation=operation.id,
        )
    return operation
