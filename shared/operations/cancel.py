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
    session.refresh(operation)
    if operation.state == "cancelled" or operation.cancel_requested_at:
        return operation
    if operation.state != "running" or operation.committed:
        raise errors.NotCancellable(
            f"Operation {operation.id} has {operation.state if operation.finished_at else 'done'}"
            " its work already; nothing was changed. A revert or restore can be undone with "
            "`triptych operation undo`.",
            operation=operation.id,
        )
    operation.cancel_requested_at = now()
    session.add(operation)
    return operation
