"""Beat's tick of the schedules: one run per due slot, however many ticks run (I5)."""

from datetime import datetime, timedelta
from typing import Any

import structlog
from celery import shared_task
from sqlalchemy import select, update
from sqlmodel import Session

from shared import errors, events
from shared.commands import CreateImage
from shared.database import now, transaction
from shared.models import Schedule, ScheduleRun, Server
from shared.operations.drain import refuse_new_work
from shared.operations.finish import fail_run
from shared.operations.outbox import flush_if_possible
from shared.operations.submit import submit
from shared.slots import next_slot

log = structlog.get_logger()

MISSED = (
    "missed while Triptych was down or its host was draining; only the newest missed slot is "
    "made up for"
)


@shared_task(name="imager.run_due_schedules")
def run_due_schedules() -> None:
    run_due(now())
    flush_if_possible()


def run_due(moment: datetime) -> int:
    """Claim every schedule whose next slot has come; returns how many runs were started."""
    row: Any = Schedule
    with transaction() as session:
        due = select(Schedule).where(row.next_run_at <= moment).order_by(row.next_run_at)
        found = list(session.scalars(due))
    started = 0
    for schedule in found:
        try:
            started += _run(schedule, moment)
        except errors.HostDraining:  # its slots stay due until the host is resumed
            continue
        except Exception:  # one that cannot be run must not keep the others from running
            log.exception("schedule.broken", schedule=schedule.id)
    return started


def _run(schedule: Schedule, moment: datetime) -> bool:
    """One transaction per schedule: the slots it missed, the run, the next slot."""
    slots = _slots_until(schedule, moment)
    newest, missed = slots[-1], slots[:-1]
    row: Any = Schedule
    with transaction() as session:
        server = session.get_one(Server, schedule.server_id)
        refuse_new_work(session, server.host)
        claimed = session.execute(
            update(Schedule)
            .where(row.id == schedule.id, row.next_run_at == schedule.next_run_at)
            .values(next_run_at=_next(schedule, moment))
        )
        if claimed.rowcount != 1:  # type: ignore[attr-defined]
            return False  # another tick has it
        for slot in missed:
            _skip(session, schedule, slot, MISSED)
        if moment - newest > timedelta(seconds=schedule.catch_up_s):
            late = int((moment - newest).total_seconds())
            window = schedule.catch_up_s
            _skip(session, schedule, newest, f"{late} s late, past the window of {window} s")
            return False
        return _start(session, schedule, server, newest)


def _slots_until(schedule: Schedule, moment: datetime) -> list[datetime]:
    """The slots from the one that is due up to `moment`, at least one."""
    slot = schedule.next_run_at
    assert slot is not None  # noqa: S101  only due schedules come here
    slots = [slot]
    while (slot := _next(schedule, slot)) <= moment:
        slots.append(slot)
    return slots


def _next(schedule: Schedule, after: datetime) -> datetime:
    return next_slot(schedule.kind, schedule.at, schedule.weekday, schedule.timezone, after)


def _skip(session: Session, schedule: Schedule, slot: datetime, reason: str) -> None:
    session.add(ScheduleRun(schedule_id=schedule.id, slot=slot, state="skipped", reason=reason))
    events.emit(
        session,
        "image.missed",
        schedule.server_id,
        schedule=schedule.kind,
        slot=slot.isoformat(),
        reason=reason,
    )


def _start(session: Session, schedule: Schedule, server: Server, slot: datetime) -> bool:
    run = ScheduleRun(schedule_id=schedule.id, slot=slot, state="running")
    session.add(run)
    try:
        operation = submit(
            session,
            CreateImage(server=server.id),
            requested_by=f"schedule:{schedule.kind}",
            idempotency_key=f"slot:{schedule.id}:{slot.isoformat()}",
        )
    except errors.TriptychError as error:
        fail_run(session, run, error.detail)
        log.error("schedule.refused", schedule=schedule.id, code=error.code)
        return False
    run.operation_id = operation.id
    return True
