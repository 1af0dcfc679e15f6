"""What becomes of a schedule's slots: planned, at a server's own time, or skipped with a reason.

A slot is nominal: 03:00 local time. Its run starts a little later, so that not all servers of a
host are copied in the same minute (I5, I6; docs/decisions/0023).
"""

import hashlib
from datetime import datetime, timedelta
from itertools import chain
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared import events
from shared.models import Schedule, ScheduleRun
from shared.settings import settings
from shared.slots import slots_after

TOLD_SINGLY = 14
"""Of the slots that one outage has missed the newest, each with a row and an event of its own;
what came before is one row and one event together."""
_HALF_A_DAY = timedelta(hours=12)


def spread(server_id: str) -> timedelta:
    """How long after a slot the server's runs start: always the same, in whole seconds."""
    share = int.from_bytes(hashlib.sha256(server_id.encode()).digest()[:8]) / 2**64
    return timedelta(seconds=int(settings().schedule_spread.total_seconds() * share))


def plan(schedule: Schedule, slot: datetime | None) -> None:
    """Make this the slot that runs next; none while the schedule is disabled."""
    schedule.next_run_at = slot
    schedule.start_at = None if slot is None else slot + spread(schedule.server_id)


def offset(schedule: Schedule) -> timedelta:
    """How long after its slot the next run starts, as it was planned."""
    assert schedule.next_run_at and schedule.start_at  # noqa: S101  it is enabled
    return schedule.start_at - schedule.next_run_at


def come(schedule: Schedule, moment: datetime) -> tuple[list[datetime], datetime]:
    """The slots from the one that was planned on which have come by `moment`, and the next one.

    Where the zone's rules have changed since it was planned, the slot is where they have it now:
    the one nearest to the plan, which may still be ahead.
    """
    planned = schedule.next_run_at
    assert planned  # noqa: S101  it is enabled
    slots = slots_after(
        schedule.kind, schedule.at, schedule.weekday, schedule.timezone, planned - _HALF_A_DAY
    )
    first, second = next(slots), next(slots)
    nearest = [first, second] if planned - first <= second - planned else [second]
    found: list[datetime] = []
    for slot in chain(nearest, slots):
        if slot > moment:
            return found, slot
        found.append(slot)
    raise AssertionError("slots never end")


def unrecorded(session: Session, schedule: Schedule, slots: list[datetime]) -> list[datetime]:
    """Those of the slots that have no run yet: a clock that was ahead may have begun one."""
    row: Any = ScheduleRun
    query = select(row.slot).where(row.schedule_id == schedule.id, row.slot.in_(slots))
    recorded = set(session.scalars(query))
    return [slot for slot in slots if slot not in recorded]


def skip(session: Session, schedule: Schedule, slots: list[datetime], reason: str) -> None:
    """Record that these slots, oldest first, have no image and why: each by itself, but those of
    a long outage."""
    older, newer = slots[:-TOLD_SINGLY], slots[-TOLD_SINGLY:]
    if older:
        run = ScheduleRun(schedule_id=schedule.id, slot=older[-1], first_slot=older[0], state="")
        session.add(run)
        record_skipped(session, schedule, run, f"{reason} (the same for {len(older)} slots)")
    for slot in newer:
        run = ScheduleRun(schedule_id=schedule.id, slot=slot, state="")
        session.add(run)
        record_skipped(session, schedule, run, reason)


def record_skipped(session: Session, schedule: Schedule, run: ScheduleRun, reason: str) -> None:
    """Make the run a skipped one."""
    run.state, run.reason = "skipped", reason
    first = {"first_slot": run.first_slot.isoformat()} if run.first_slot else {}
    events.emit(
        session,
        "image.missed",
        schedule.server_id,
        schedule=schedule.kind,
        slot=run.slot.isoformat(),
        reason=reason,
        **first,
    )


def too_late(give_up_at: datetime) -> str:
    """Why a run that is queued does not begin any more."""
    return (
        f"No worker of its host could begin by {give_up_at:%Y-%m-%d %H:%M} UTC, the end of the "
        "catch-up window or the start of the next slot. Nothing was copied; see whether the "
        "host's imager runs, and how long its queue is."
    )
