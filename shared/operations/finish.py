"""The end of an operation: its row, what hangs on it, and waking the next one."""

from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared import errors, events, farms
from shared.database import from_now
from shared.models import Operation, Schedule, ScheduleRun, Server
from shared.operations import holds
from shared.operations.outbox import wake
from shared.operations.tally import count
from shared.runs import record_skipped

FAILURES_BEFORE_ALARM = 4


def finish(
    session: Session, operation: Operation, state: str, error: dict[str, Any] | None = None
) -> None:
    """Set the final state, as the last thing in the caller's transaction.

    From here to the commit no operation of this server is submitted: it would be too late to be
    woken by this one, and its own message too early to find the server free.
    """
    server: Any = Server
    locked = select(from_now(0)).where(server.id == operation.server_id).with_for_update(of=Server)
    moment = session.scalars(locked).one()
    operation.state = operation.phase = state
    operation.error = error
    operation.finished_at = moment
    operation.owner = operation.lease_expires_at = None
    if state == "succeeded":
        operation.progress = 100
    session.add(operation)
    farms.settle(session, operation, moment)
    _settle_run(session, operation)
    events.emit(
        session,
        f"operation.{state}",
        operation.server_id,
        operation=operation.id,
        kind=operation.kind,
        error=error,
    )
    for server_id in (operation.server_id, *holds.release(session, operation)):
        wake_next(session, server_id)
    count(session, operation)


def wake_next(session: Session, server_id: str) -> None:
    session.flush()
    waiting: Any = Operation
    query = select(Operation).where(waiting.server_id == server_id, waiting.state == "queued")
    # One that is locked is being cancelled, or woken already; whoever does that may be waiting
    # for what this transaction has locked.
    free = query.order_by(waiting.seq).limit(1).with_for_update(skip_locked=True)
    if following := session.scalars(free).first():
        wake(session, following)


def _settle_run(session: Session, operation: Operation) -> None:
    if operation.kind != "image.create":
        return
    query = select(ScheduleRun).where(ScheduleRun.operation_id == operation.id)  # type: ignore[arg-type]
    run = session.scalars(query).one_or_none()
    if run is None:
        return
    if operation.state == "succeeded":
        _succeed_run(session, run, (operation.result or {}).get("image"))
        return
    error = operation.error or {"code": "", "message": operation.state}
    if error["code"] == errors.SlotMissed.code:
        schedule = session.get_one(Schedule, run.schedule_id)
        record_skipped(session, schedule, run, error["message"])
        return
    fail_run(session, run, error["message"])


def _succeed_run(session: Session, run: ScheduleRun, image: str | None) -> None:
    run.state, run.image_id = "succeeded", image
    schedule = _locked(session, run)
    if schedule.failures_in_row >= FAILURES_BEFORE_ALARM:
        _tell(session, schedule, "schedule.recovered", image=image)
    schedule.failures_in_row = 0


def fail_run(session: Session, run: ScheduleRun, reason: str) -> None:
    """Record that a schedule's run failed, and say so loudly when that goes on (I6)."""
    run.state, run.reason = "failed", reason
    schedule = _locked(session, run)
    schedule.failures_in_row += 1
    if schedule.failures_in_row == FAILURES_BEFORE_ALARM:
        _tell(session, schedule, "schedule.failing", reason=reason)


def _locked(session: Session, run: ScheduleRun) -> Schedule:
    """The run's schedule as it is now: two runs that end at once both count."""
    query = select(Schedule).where(Schedule.id == run.schedule_id)  # type: ignore[arg-type]
    current = query.with_for_update().execution_options(populate_existing=True)
    return session.scalars(current).one()


def _tell(session: Session, schedule: Schedule, fact: str, **data: Any) -> None:
    """`failures_in_row` is what a streak came to so far, or in the end."""
    events.emit(
        session,
        fact,
        schedule.server_id,
        schedule=schedule.kind,
        failures_in_row=schedule.failures_in_row,
        **data,
    )
