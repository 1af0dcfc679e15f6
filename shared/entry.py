"""The queue entry of every task: an operation's id, or a full command from anyone."""

from typing import Any

import structlog

from shared import errors
from shared.commands import Command
from shared.database import transaction
from shared.operations.patience import DATABASE_AWAY
from shared.operations.runner import run
from shared.operations.submit import submit

log = structlog.get_logger()

DATABASE_RETRY = 15
"""Seconds."""


def receive(
    task: Any, command: type[Command], operation_id: str | None, fields: dict[str, Any]
) -> None:
    """Run the operation; a command without one becomes an operation first.

    The Celery task id is the idempotency key, so a message delivered twice does its work
    once (E4). A command that is refused is logged and ends the message; while the database
    is away it is sent again later, since nothing else remembers it.
    """
    if operation_id is None:
        try:
            with transaction() as session:
                operation_id = submit(
                    session,
                    command.model_validate(fields),
                    requested_by="queue",
                    idempotency_key=f"celery:{task.request.id}",
                ).id
        except (errors.TriptychError, ValueError) as error:
            code = getattr(error, "code", errors.InvalidRequest.code)
            log.error("command.refused", kind=command.kind, code=code, reason=str(error))
            return
        except DATABASE_AWAY as error:
            raise task.retry(exc=error, countdown=DATABASE_RETRY, max_retries=None) from error
    if not isinstance(operation_id, str):
        log.error("message.refused", kind=command.kind, reason="operation_id is no string")
        return
    try:
        run(operation_id)
    except errors.OperationNotFound as error:
        log.error("message.refused", kind=command.kind, reason=error.detail)
