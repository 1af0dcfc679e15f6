"""Carrying out one operation: claim, handler, commit; or undo.

claim ── handler ── commit ── redo entries ── succeeded
            │ error, cancel, crash
            └── undo entries ── failed, cancelled, or another attempt
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import structlog

from shared import errors, faults, lookups
from shared.commands import Command, parse
from shared.database import database_now, reading, transaction
from shared.models import Operation
from shared.operations import claim, journal, presence
from shared.operations.claim import held
from shared.operations.context import Context, Outcome
from shared.operations.finish import finish
from shared.operations.outbox import flush_if_possible, wake
from shared.operations.patience import DATABASE_AWAY, patiently
from shared.settings import settings

log = structlog.get_logger()

Handler = Callable[[Context, Any], Outcome]
_HANDLERS: dict[str, Handler] = {}
NOT_CLEARED_UP = "not_cleared_up"
"""The code of an error that says why clearing up after a lost worker must be tried again; any
other error on a row that is still running is the verdict that it ends with once cleared up."""


def handles(command: type[Command]) -> Callable[[Handler], Handler]:
    """Register the function that carries out a kind of operation in this process."""

    def register(handler: Handler) -> Handler:
        _HANDLERS[command.kind] = handler
        return handler

    return register


def run(operation_id: str) -> None:
    """Do, resume or clear up the operation, if it is this worker's turn; else nothing.

    Raises OperationNotFound.
    """
    with reading() as session:
        asked = lookups.operation(session, operation_id)
    if asked.finished_at:  # the message came twice, or after a cancel
        return
    if asked.kind not in _HANDLERS or asked.host != settings().host:
        log.error("operation.misdirected", operation=operation_id, kind=asked.kind, to=asked.host)
        return
    with (
        structlog.contextvars.bound_contextvars(operation=operation_id),
        presence.attempt(asked.service) as owner,
    ):
        take, work = claim.claim, _attempt
        if asked.state == "running":
            take, work = claim.take_over, _recover
        operation = take(operation_id, owner)
        if operation is None:
            return
        faults.point("claimed")
        try:
            work(operation, owner)
        except errors.LeaseLost:
            log.warning("operation.lease_lost")
        except DATABASE_AWAY as error:  # whoever takes it over finds all in the journal
            log.warning("operation.abandoned", reason=str(error).splitlines()[0])
    flush_if_possible()


def clear_up(operation_id: str) -> None:
    """What a successor does first with a running operation whose worker is gone, and no more.

    For one who cannot do the work itself: undone, the operation is left to a worker, who is
    woken. Nothing happens while its worker lives. Raises OperationNotFound, LeaseLost, and what
    a database raises that is away.
    """
    with reading() as session:
        asked = lookups.operation(session, operation_id)
    with presence.attempt(asked.service) as owner:
        operation = claim.take_over(operation_id, owner)
        if operation is not None and _cleared_up(operation, owner):
            with transaction() as session:
                current = held(session, operation_id, owner)
                current.owner, current.lease_expires_at = None, database_now(session)
                wake(session, current)
    flush_if_possible()


def _recover(operation: Operation, owner: str) -> None:
    """Go on where a dead worker stopped."""
    if not _cleared_up(operation, owner):
        return
    with transaction() as session:
        operation = held(session, operation.id, owner)
        operation.attempt += 1
        operation.error = None
    _attempt(operation, owner)


def _cleared_up(operation: Operation, owner: str) -> bool:
    """Finish or undo what a dead worker began; True if the work is to be done once more."""
    log.warning("operation.taken_over", committed=operation.committed)
    with Context(operation, owner):
        if operation.committed:
            _complete(operation, owner)
        elif _undone(operation, owner):
            verdict = verdict_of(operation)
            if verdict is None:
                return True
            _end(operation, owner, verdict)
    return False


def verdict_of(operation: Operation) -> dict[str, Any] | None:
    """How an operation that a worker left behind ends; None when it is tried again."""
    if operation.error and operation.error["code"] != NOT_CLEARED_UP:
        return operation.error
    if operation.cancel_requested_at:
        return describe(errors.Cancelled("Cancelled on request."))
    if operation.attempt >= settings().max_attempts:
        return {
            "code": "worker_lost",
            "message": f"The worker died in each of {operation.attempt} attempts. "
            "Everything was put back as it was before. Look into the worker's log, "
            "then ask again.",
        }
    return None


def _attempt(operation: Operation, owner: str) -> None:
    log.info("operation.started", kind=operation.kind, attempt=operation.attempt)
    with Context(operation, owner) as context:
        try:
            context.check()
            handler = _HANDLERS[operation.kind]
            outcome = handler(context, parse(operation.kind, operation.command))
            context.check()
            faults.point("committing")
            operation = _committed(context, outcome)
        except (errors.LeaseLost, *DATABASE_AWAY):
            raise
        except Exception as error:
            context.check_lease()  # the error may only tell how the work was stopped
            _fail(operation, owner, error)
            return
        _complete(operation, owner)


def _committed(context: Context, outcome: Outcome) -> Operation:
    """Commit, however long the database is away, unless the operation is lost meanwhile."""
    try:
        return patiently(context.check, lambda: _commit(context, outcome))
    except errors.LeaseLost:
        with reading() as session:
            current = lookups.operation(session, context.id)
        if current.state == "succeeded" and current.result == outcome.result:
            return current  # an earlier try had done it; only its answer was lost
        raise


def _commit(context: Context, outcome: Outcome) -> Operation:
    """The point of no return: rows, result and what is left to do, in one transaction."""
    with transaction() as session:
        current = held(session, context.id, context.owner)
        if current.committed:  # by an earlier try, whose answer was lost
            return current
        if current.cancel_requested_at:
            raise errors.Cancelled("Cancelled on request; everything is as it was before.")
        left_to_do = outcome.apply(session) or []
        for name, value in context.latest().items():
            setattr(current, name, value)
        current.committed = True
        current.result = outcome.result
        current.undo, current.undo_until = outcome.undo, outcome.undo_until
        if context.leftovers:
            journal.leave(session, current.id, context.leftovers)
        journal.clear(session, current.id, "undo")
        for name, arguments in left_to_do:
            journal.write(session, current.id, "redo", name, **arguments)
        if not left_to_do and not context.leftovers:  # then one transaction is enough
            finish(session, current, "succeeded")
        return current


def _complete(operation: Operation, owner: str) -> None:
    """Finish what was committed: done now, or again after the next tick."""
    faults.point("committed")
    if operation.state == "succeeded":
        return
    try:
        journal.play(operation.id, owner, "redo")
    except errors.LeaseLost:
        raise
    except Exception as error:
        _try_again_later(operation, owner, "finishing", error)
        return
    faults.point("finishing")
    with transaction() as session:
        finish(session, held(session, operation.id, owner), "succeeded")
    log.info("operation.succeeded", result=operation.result)


def _fail(operation: Operation, owner: str, error: Exception) -> None:
    """Undo, then end with the error, which is written down first: undoing may fail or die."""
    if not isinstance(error, errors.TriptychError):
        log.exception("operation.crashed")
    verdict = describe(error)
    with transaction() as session:
        current = held(session, operation.id, owner)
        if not current.committed:
            current.error = verdict
    if current.committed:  # the error was the commit's answer getting lost
        _complete(current, owner)
    elif _undone(operation, owner):
        _end(operation, owner, verdict)


def _end(operation: Operation, owner: str, verdict: dict[str, Any]) -> None:
    faults.point("ending")
    as_intended = (errors.Cancelled.code, errors.SlotMissed.code)
    state = "cancelled" if verdict["code"] in as_intended else "failed"
    with transaction() as session:
        finish(session, held(session, operation.id, owner), state, verdict)
    log.info(f"operation.{state}", **verdict)


def describe(error: Exception) -> dict[str, Any]:
    """The `error` member of an operation."""
    if isinstance(error, errors.TriptychError):
        return {"code": error.code, "message": error.detail}
    return {
        "code": errors.TriptychError.code,
        "message": f"Unexpected {type(error).__name__}: {error}. Everything was put back as it "
        "was before; the worker's log has the details.",
    }


def _undone(operation: Operation, owner: str) -> bool:
    """Undo what was journalled; False when that must be tried again later."""
    try:
        journal.play(operation.id, owner, "undo")
    except errors.LeaseLost:
        raise
    except Exception as error:
        _try_again_later(operation, owner, "recovering", error)
        return False
    return True


def _try_again_later(operation: Operation, owner: str, phase: str, error: Exception) -> None:
    """Keep the server locked and let the reaper come back, after half a tick: giving up would
    leave a mess."""
    log.exception("operation.not_cleared_up", phase=phase)
    with transaction() as session:
        current = held(session, operation.id, owner)
        current.phase = phase
        if current.error is None or current.error["code"] == NOT_CLEARED_UP:
            reason = f"Clearing up is tried again: {type(error).__name__}: {error}"
            current.error = {"code": NOT_CLEARED_UP, "message": reason}
        current.owner = None
        soon = timedelta(seconds=settings().tick / 2)
        current.lease_expires_at = database_now(session) + soon
