"""Carrying out one operation: claim, handler, commit; or undo.

claim ── handler ── commit ── redo entries ── succeeded
            │ error, cancel, crash
            └── undo entries ── failed, cancelled, or another attempt
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import structlog

from shared import errors, lookups
from shared.commands import Command, parse
from shared.database import database_now, transaction
from shared.models import Operation
from shared.operations import claim, journal, presence
from shared.operations.context import Context, Outcome
from shared.operations.finish import finish
from shared.operations.outbox import flush_if_possible
from shared.settings import settings

log = structlog.get_logger()

Handler = Callable[[Context, Any], Outcome]
_HANDLERS: dict[str, Handler] = {}
RECOVERY_RETRY = timedelta(seconds=15)


def handles(command: type[Command]) -> Callable[[Handler], Handler]:
    """Register the function that carries out a kind of operation in this process."""

    def register(handler: Handler) -> Handler:
        _HANDLERS[command.kind] = handler
        return handler

    return register


def run(operation_id: str) -> None:
    """Do, resume or clear up the operation, if it is this worker's turn; else nothing."""
    with transaction() as session:
        service = lookups.operation(session, operation_id).service
    owner = presence.owner_name(service)
    with structlog.contextvars.bound_contextvars(operation=operation_id):
        if operation := claim.claim(operation_id, owner):
            _attempt(operation, owner)
        elif operation := claim.take_over(operation_id, owner):
            log.warning("operation.taken_over", committed=operation.committed)
            _recover(operation, owner)
    flush_if_possible()


def _recover(operation: Operation, owner: str) -> None:
    """Go on where a dead worker stopped."""
    with Context(operation, owner):
        if operation.committed:
            _complete(operation)
            return
        if not _undone(operation):
            return
        if operation.cancel_requested_at:
            _end(operation, "cancelled", errors.Cancelled("Cancelled on request."))
            return
        if operation.attempt >= settings().max_attempts:
            lost = {
                "code": "worker_lost",
                "message": f"The worker died in each of {operation.attempt} attempts. "
                "Everything was put back as it was before. Look into the worker's log, "
                "then ask again.",
            }
            with transaction() as session:
                finish(session, session.merge(operation), "failed", lost)
            return
    _attempt(operation, owner)


def _attempt(operation: Operation, owner: str) -> None:
    with transaction() as session:
        operation = session.merge(operation)
        operation.attempt += 1
    log.info("operation.started", kind=operation.kind, attempt=operation.attempt)
    with Context(operation, owner) as context:
        try:
            context.check()
            handler = _HANDLERS[operation.kind]
            outcome = handler(context, parse(operation.kind, operation.command))
            context.check()
            operation = _commit(operation, owner, outcome)
        except errors.LeaseLost:
            log.warning("operation.lease_lost")
            return
        except Exception as error:
            _fail(operation, error)
            return
        _complete(operation)


def _commit(operation: Operation, owner: str, outcome: Outcome) -> Operation:
    """The point of no return: rows, result and what is left to do, in one transaction."""
    with transaction() as session:
        current = lookups.operation(session, operation.id)
        if current.owner != owner:
            raise errors.LeaseLost(f"Operation {operation.id} was taken over.")
        left_to_do = outcome.apply(session) or []
        current.committed = True
        current.result = outcome.result
        current.undo, current.undo_until = outcome.undo, outcome.undo_until
        journal.clear(session, current.id, "undo")
        for name, arguments in left_to_do:
            journal.write(session, current.id, "redo", name, **arguments)
        if not left_to_do:  # nothing is left to do: one transaction is enough
            finish(session, current, "succeeded")
        return current


def _complete(operation: Operation) -> None:
    """Finish what was committed: done now, or again after the next tick."""
    if operation.state == "succeeded":
        return
    try:
        journal.play(operation.id, "redo")
    except Exception as error:
        _try_again_later(operation, "finishing", error)
        return
    with transaction() as session:
        finish(session, session.merge(operation), "succeeded")
    log.info("operation.succeeded", result=operation.result)


def _fail(operation: Operation, error: Exception) -> None:
    if not isinstance(error, errors.TriptychError):
        log.exception("operation.crashed")
    if _undone(operation):
        state = "cancelled" if isinstance(error, errors.Cancelled) else "failed"
        _end(operation, state, error)


def _end(operation: Operation, state: str, error: Exception) -> None:
    document = describe(error)
    with transaction() as session:
        finish(session, lookups.operation(session, operation.id), state, document)
    log.info(f"operation.{state}", **document)


def describe(error: Exception) -> dict[str, Any]:
    """The `error` member of an operation."""
    if isinstance(error, errors.TriptychError):
        return {"code": error.code, "message": error.detail}
    return {
        "code": errors.TriptychError.code,
        "message": f"Unexpected {type(error).__name__}: {error}. Everything was put back as it "
        "was before; the worker's log has the details.",
    }


def _undone(operation: Operation) -> bool:
    """Undo what was journalled; False when that must be tried again later."""
    try:
        journal.play(operation.id, "undo")
    except Exception as error:
        _try_again_later(operation, "recovering", error)
        return False
    return True


def _try_again_later(operation: Operation, phase: str, error: Exception) -> None:
    """Keep the server locked and let the reaper come back: giving up would leave a mess."""
    log.exception("operation.not_cleared_up", phase=phase)
    with transaction() as session:
        current = lookups.operation(session, operation.id)
        current.phase, current.error = phase, describe(error)
        current.owner = None
        current.lease_expires_at = database_now(session) + RECOVERY_RETRY
