"""Beat's tick of the schedules: one run per due slot, however many ticks run (I5).

What it costs follows what is due, not what there is: all it asks for is found by index, and what
is due is claimed in pages, some hundred schedules in a transaction of few statements. Nothing is
waited for but the lock of a host's row: whoever else holds a schedule or its server goes first,
and the next tick takes what was passed over (docs/decisions/0024).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from math import inf
from typing import Any
from zoneinfo import ZoneInfoNotFoundError

import structlog
from celery import shared_task
from sqlalchemy import literal_column, or_, select
from sqlmodel import Session

from shared import errors, runs
from shared.commands import CreateImage
from shared.database import database_now, reading, transaction
from shared.models import Host, Operation, Schedule, ScheduleRun, Server
from shared.operations import drain
from shared.operations.admission import admit
from shared.operations.finish import fail_run, finish
from shared.operations.outbox import flush_if_possible
from shared.operations.pages import PAGE, all_but_broken
from shared.operations.submit import queue
from shared.settings import settings
from shared.slots import next_slot

log = structlog.get_logger()

MISSED = (
    "missed while Triptych was down or its host was draining; only the newest missed slot is "
    "made up for"
)
FURTHEST = {"daily": timedelta(hours=26), "weekly": timedelta(days=7, hours=2)}
"""From now to a next slot: the period, and a clock change."""
QUEUED = timedelta(hours=1)
"""A run may wait that long for its host's other copies, however small its schedule's window."""
RUNNING: Any = literal_column("'running'")
"""As it stands in the condition of the index; SQLite compares no parameter with that."""
TOLD_AGAIN = 3600.0
"""Seconds for which a schedule that cannot be claimed is not logged again."""
_told: dict[str, float] = {}
_under_way = threading.Lock()


@shared_task(name="imager.run_due_schedules")
def run_due_schedules() -> None:
    """Ends after about one interval, to leave the thread to other ticks; the next goes on."""
    if not _under_way.acquire(blocking=False):
        return  # the tick before is still at it
    try:
        with reading() as session:
            moment = database_now(session)  # ours may have been put right since it was compared
        give_up_missed(moment)
        run_due(moment, settings().tick)
    finally:
        _under_way.release()
    flush_if_possible()


def run_due(moment: datetime, seconds: float = inf) -> int:
    """Claim every schedule whose start has come, for at most `seconds` and the page then begun;
    returns how many runs were started."""
    end, started = time.monotonic() + seconds, 0
    for kind in FURTHEST:
        while _bring_back(kind, moment) == PAGE:
            pass
        for page in _due(kind, moment):
            started += all_but_broken(page, partial(_claim, moment=moment), _broken)
            if time.monotonic() > end:
                break
    return started


def _due(kind: str, moment: datetime) -> Iterator[list[str]]:
    """The ids of what is due, earliest first, page by page; those that stay due come once."""
    row: Any = Schedule
    server: Any = Server
    host: Any = Host
    query = (
        select(row.start_at, row.id)
        .join(Server, server.id == row.server_id)
        .join(Host, host.name == server.host)
        .where(row.kind == kind, row.start_at <= moment, host.draining_since.is_(None))
        .order_by(row.start_at, row.id)
        .limit(PAGE)
    )
    rest = query
    while True:
        with reading() as session:
            page = list(session.execute(rest))
        if page:
            yield [id_ for _, id_ in page]
        if len(page) < PAGE:
            return
        at, id_ = page[-1]
        rest = query.where(row.start_at >= at, or_(row.start_at > at, row.id > id_))


def _broken(schedule_id: str) -> None:
    """Say so, once an hour: it is tried at each tick."""
    moment = time.monotonic()
    if moment - _told.get(schedule_id, -inf) >= TOLD_AGAIN:
        _told[schedule_id] = moment
        log.exception("schedule.broken", schedule=schedule_id)


def _claim(ids: list[str], moment: datetime) -> int:
    """One transaction: of each schedule the slots it missed, the run, the next slot."""
    with transaction() as session:
        found = _locked(session, ids, moment)
        known = _recorded(session, [schedule for schedule, _ in found])
        return sum(_settle(session, *each, moment, known) for each in found)


def _locked(session: Session, ids: list[str], moment: datetime) -> list[tuple[Schedule, Server]]:
    """Those that are still due and that nobody else is at, locked with their servers.

    The hosts first: theirs is the one lock that is waited for, before any other is held.
    """
    row: Any = Schedule
    server: Any = Server
    of = select(server.host).join(Schedule, row.server_id == server.id).where(row.id.in_(ids))
    hosts = drain.taking_work(session, set(session.scalars(of.distinct())))
    query = (
        select(Schedule, Server)
        .join(Server, server.id == row.server_id)
        .where(row.id.in_(ids), row.start_at <= moment, server.host.in_(hosts))
        .order_by(row.start_at, row.id)
        .with_for_update(key_share=True, skip_locked=True, of=(Schedule, Server))
    )
    return [(schedule, of) for schedule, of in session.execute(query)]


Recorded = dict[tuple[str, datetime], ScheduleRun]


def _recorded(session: Session, schedules: list[Schedule]) -> Recorded:
    """Runs of slots that come once more: a clock was ahead when they came first."""
    row: Any = ScheduleRun
    since = [each.next_run_at for each in schedules if each.next_run_at]
    if not since:
        return {}
    query = select(ScheduleRun).where(
        row.schedule_id.in_([each.id for each in schedules]),
        row.slot >= min(since) - timedelta(days=1),
    )
    return {(each.schedule_id, each.slot): each for each in session.scalars(query)}


def _settle(
    session: Session, schedule: Schedule, server: Server, moment: datetime, known: Recorded
) -> bool:
    """Start the newest slot's run if it may still run, and record the others; True if it began."""
    offset = runs.offset(schedule)
    slots, following = runs.come(schedule, moment - offset)
    runs.plan(schedule, following)
    if not slots:  # the zone's rules have changed, and it is later than was planned
        return False
    newest = slots[-1]
    missed = [slot for slot in slots[:-1] if (schedule.id, slot) not in known]
    runs.skip(session, schedule, missed, MISSED)
    run = known.get((schedule.id, newest))
    if run and run.state != "skipped":
        return False
    start, window = newest + offset, timedelta(seconds=schedule.catch_up_s)
    if moment - start > window:
        late = int((moment - start).total_seconds())
        reason = f"{late} s late, past the window of {schedule.catch_up_s} s"
        runs.skip(session, schedule, [] if run else [newest], reason)
        return False
    if run is None:
        run = ScheduleRun(schedule_id=schedule.id, slot=newest, state="running")
        session.add(run)
    run.state, run.reason, run.start_at = "running", None, start
    run.give_up_at = min(moment + max(window, QUEUED), following + offset)
    return _start(session, schedule, server, run)


def _start(session: Session, schedule: Schedule, server: Server, run: ScheduleRun) -> bool:
    try:
        admitted = admit(CreateImage(server=server.id), session)
    except errors.TriptychError as error:
        fail_run(session, run, error.detail)
        log.error("schedule.refused", schedule=schedule.id, code=error.code)
        return False
    key = f"slot:{schedule.id}:{run.slot.isoformat()}"
    run.operation_id = queue(session, admitted, f"schedule:{schedule.kind}", key).id
    return True


def _bring_back(kind: str, moment: datetime) -> int:
    """Plan anew what is further ahead than any slot can be: it was planned by a clock that was
    ahead itself. Returns how many, at most a page."""
    row: Any = Schedule
    bound = moment + FURTHEST[kind] + settings().schedule_spread
    query = select(Schedule).where(row.kind == kind, row.start_at > bound).limit(PAGE)
    with reading() as session:  # so that a tick with nothing to do takes no lock
        if session.scalars(query.limit(1)).first() is None:
            return 0
    changed = 0
    with transaction() as session:
        locked = query.with_for_update(key_share=True, skip_locked=True)
        for schedule in session.scalars(locked):
            planned = schedule.next_run_at
            timing = schedule.kind, schedule.at, schedule.weekday, schedule.timezone
            with suppress(ZoneInfoNotFoundError):  # then it stays broken, and the others come back
                runs.plan(schedule, next_slot(*timing, moment))
            if schedule.next_run_at != planned:
                changed += 1
    if changed:
        log.warning("schedule.brought_back", kind=kind, schedules=changed)
    return changed


def give_up_missed(moment: datetime) -> int:
    """Skip the runs that no worker has begun in their time; returns how many.

    Else a host that comes back after days would make an image for each of them, all of the same
    state, and rotation would take the older ones away.
    """
    run: Any = ScheduleRun
    operation: Any = Operation
    query = (
        select(operation.id, run.give_up_at)
        .join(ScheduleRun, run.operation_id == operation.id)
        .where(run.state == RUNNING, run.give_up_at <= moment, operation.state == "queued")
        .order_by(run.give_up_at)
        .limit(PAGE)
    )
    with reading() as session:
        found = list(session.execute(query))
    return sum(_give_up(id_, give_up_at) for id_, give_up_at in found)


def _give_up(operation_id: str, give_up_at: datetime) -> bool:
    row: Any = Operation
    waiting = select(Operation).where(row.id == operation_id, row.state == "queued")
    with transaction() as session:
        operation = session.scalars(waiting.with_for_update(skip_locked=True)).first()
        if operation is None:
            return False  # a worker has begun
        missed = {"code": errors.SlotMissed.code, "message": runs.too_late(give_up_at)}
        finish(session, operation, "cancelled", missed)
        return True
