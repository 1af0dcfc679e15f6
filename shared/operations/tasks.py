"""Beat's own tasks that belong to no service: the reaper, the relay, and the end of undo."""

from typing import Any

import structlog
from celery import shared_task
from sqlalchemy import select

from shared import errors
from shared.commands import Command, ForgetRestore, ForgetRevert, RestoreImage, RevertSnapshot
from shared.database import now, transaction
from shared.models import Operation
from shared.operations import outbox
from shared.operations.reconcile import reconcile as _reconcile
from shared.operations.submit import submit

log = structlog.get_logger()

_FORGET: dict[str, type[Command]] = {
    RevertSnapshot.kind: ForgetRevert,
    RestoreImage.kind: ForgetRestore,
}


@shared_task(name="operations.reconcile")
def reconcile() -> None:
    _reconcile()


@shared_task(name="events.relay")
def relay() -> None:
    outbox.flush_if_possible()


@shared_task(name="operations.forget_due")
def forget_due() -> None:
    """Drop what reverts and restores set aside, when the time to undo them is over (E1)."""
    row: Any = Operation
    with transaction() as session:
        underway = select(row.server_id).where(
            row.kind.in_([each.kind for each in _FORGET.values()]),
            row.state.in_(("queued", "running")),
        )
        due = select(Operation).where(row.undo_until <= now(), row.server_id.not_in(underway))
        for operation in list(session.scalars(due)):
            forget = _FORGET[operation.kind].model_validate({"operation": operation.id})
            try:
                submit(session, forget, requested_by="beat:undo")
            except errors.TriptychError as error:  # the others are forgotten all the same
                log.error("forget.refused", operation=operation.id, code=error.code)
    outbox.flush_if_possible()
