"""Who claims what: beats and imagers at once, pages, and what cannot be claimed (I5)."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from operations.spine import Killed, World, outputs, python
from schedules.planned import (
    DAY,
    HOUR,
    SLOT,
    now_of,
    operations,
    runs,
    scheduled,
    set_plan,
    states,
)
from schedules.rotating import Disk
from sqlalchemy import select, update
from structlog.testing import capture_logs

from services.api import schedules as api
from services.imager import images, ticks
from shared.commands import CreateImage
from shared.database import now, transaction
from shared.models import Image, Operation, Schedule, ScheduleRun, Server
from shared.operations import drain, runner
from shared.operations.context import Context, Outcome
from shared.operations.finish import fail_run

BEAT = """
import sys
from datetime import datetime
from services.imager import ticks
for moment in sys.argv[1:]:
    print(ticks.run_due(datetime.fromisoformat(moment)))
"""


def imager(stop: threading.Event, times: int = 2) -> None:
    """Takes whatever is not done, and hears of each more than once."""
    while True:
        last = stop.is_set()
        for operation in [each for each in operations() if not each.finished_at]:
            for _ in range(times):
                runner.run(operation.id)
        if last:
            return


def test_schedule_that_changes_while_it_is_looked_for(world: World, any_database: str) -> None:
    """Between beat's look and its claim one is disabled, of another the host is drained: nothing
    begins, nothing is missed, and nothing is broken."""
    here, elsewhere = world.server("here"), world.server("elsewhere", host="kvm-2")
    off, waits = scheduled(world, here), scheduled(world, elsewhere)
    set_plan(here.id, enabled=False)
    before = states(off)
    with transaction() as session:
        drain.drain(session, "kvm-2")
    assert ticks._claim([off.id, waits.id], SLOT) == 0
    assert (states(off), states(waits), operations()) == (before, [], [])
    assert now_of(waits).next_run_at == SLOT


def test_two_beats_and_five_imagers_make_one_image_per_slot(
    world: World, any_database: str
) -> None:
    """Beats in processes of their own, one tick after another; workers that hear of each operation
    again and again. Counted is what was done, outside of the database."""
    done: list[str] = []

    def copy(context: Context, command: Any) -> Outcome:
        done.append(f"{context.operation.idempotency_key}")
        return Outcome({"image": f"img_{context.id}"})

    world.handler(copy, CreateImage.kind)
    servers = [world.server(f"server-{n}") for n in range(12)]
    weekly = {"kind": "weekly", "weekday": "tue"}
    schedules = [scheduled(world, each, **fields) for each in servers for fields in ({}, weekly)]
    stop = threading.Event()
    imagers = [threading.Thread(target=imager, args=[stop]) for _ in range(5)]
    for each in imagers:
        each.start()
    try:
        started = outputs([python(BEAT, *[SLOT.isoformat()] * 5) for _ in range(2)])
    finally:
        stop.set()
        for each in imagers:
            each.join()
    begun = [int(number) for each in started for number in each.split()]
    begun.append(ticks.run_due(SLOT))  # what the two passed over, each for the other's sake
    imager(stop)

    every = [f"slot:{each.id}:{SLOT.isoformat()}" for each in schedules]
    assert sorted(done) == sorted(every)
    assert sum(begun) == len(every)
    assert {tuple(states(each)) for each in schedules} == {((SLOT, "succeeded"),)}


def test_pages(world: World, any_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more than a page, all due at the same instant: each once."""
    monkeypatch.setattr(ticks, "PAGE", 3)
    schedules = [scheduled(world, world.server(f"server-{n}")) for n in range(10)]
    assert (ticks.run_due(SLOT), ticks.run_due(SLOT)) == (10, 0)
    assert {len(runs(each)) for each in schedules} == {1}
    assert len(operations()) == len(world.woken()) == 10


def test_operations_have_the_order_of_their_starts(world: World) -> None:
    """What was due first is done first."""
    late = scheduled(world, world.server("late"))
    early = scheduled(world, world.server("early"), at="02:59", next_run_at=SLOT - HOUR / 60)
    ticks.run_due(SLOT)
    assert [early.server_id, late.server_id] == [each.server_id for each in operations()]


def test_a_tick_ends_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time it begins no page; the next tick goes on."""
    monkeypatch.setattr(ticks, "PAGE", 2)
    for n in range(5):
        scheduled(world, world.server(f"server-{n}"))
    assert [ticks.run_due(SLOT, seconds=-1) for _ in range(4)] == [2, 2, 1, 0]


def test_ticks_of_one_process_do_not_pile_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one takes long, those that follow leave the threads to others."""
    within, go_on = threading.Event(), threading.Event()
    calls = []

    def long(moment: Any, seconds: float) -> int:
        calls.append(seconds)
        within.set()
        go_on.wait(10)
        return 0

    monkeypatch.setattr(ticks, "run_due", long)
    first = threading.Thread(target=ticks.run_due_schedules)
    first.start()
    assert within.wait(10)
    ticks.run_due_schedules()
    go_on.set()
    first.join()
    ticks.run_due_schedules()
    assert calls == [30.0, 30.0]


@pytest.mark.parametrize("place", [0, 4])
def test_one_that_cannot_be_claimed(
    world: World, monkeypatch: pytest.MonkeyPatch, any_database: str, place: int
) -> None:
    """Whatever the database has against it, the others of its page run; and run but once. It is
    tried again, and told of once an hour."""
    schedules = [scheduled(world, world.server(f"server-{n}")) for n in range(7)]
    broken = schedules[place]
    key = f"slot:{broken.id}:{SLOT.isoformat()}"
    world.submit(CreateImage(server=broken.server_id), key=key)

    with capture_logs() as logged:
        assert [ticks.run_due(SLOT) for _ in range(3)] == [6, 0, 0]
        monkeypatch.setattr(ticks, "TOLD_AGAIN", 0.0)
        ticks.run_due(SLOT)
    told = [each["schedule"] for each in logged if each["event"] == "schedule.broken"]
    assert told == [broken.id] * 2
    assert [len(runs(each)) for each in schedules] == [int(each != broken) for each in schedules]
    assert now_of(broken).next_run_at == SLOT


def test_zone_that_is_not_known_any_more(world: World) -> None:
    """After an update of the zones' data: it runs nothing and says why, the others run, and its
    owner can mend it, which tells of the slot that was missed."""
    lost, other = (scheduled(world, world.server(name)) for name in ("lost", "other"))
    with transaction() as session:
        session.get_one(Schedule, lost.id).timezone = "Atlantis/Lost"
    assert [ticks.run_due(SLOT), ticks.run_due(SLOT)] == [1, 0]
    assert states(other) == [(SLOT, "running")]
    [waiting] = api.runs("lost", "daily").upcoming
    assert waiting.reason
    assert (waiting.slot, "'Atlantis/Lost'" in waiting.reason) == (SLOT, True)

    set_plan(lost.server_id)
    assert states(lost) == [(SLOT, "skipped")]
    assert len(api.runs("lost", "daily").upcoming) == 10


def test_zone_that_is_not_known_keeps_no_other_from_coming_back(world: World) -> None:
    """Both were planned by a clock that was a year ahead; one of them cannot be planned anew."""
    later = SLOT + timedelta(days=365)
    lost, other = (
        scheduled(world, world.server(zone), timezone=zone, next_run_at=later)
        for zone in ("Atlantis/Lost", "UTC")
    )
    ticks.run_due(SLOT)
    assert (now_of(lost).next_run_at, now_of(other).next_run_at) == (later, SLOT + DAY)


@contextmanager
def locked(row: type, id_: Any) -> Iterator[None]:
    with transaction() as session:
        session.get_one(row, id_, with_for_update=True)
        yield


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("what", [Server, Schedule])
def test_nothing_is_waited_for(world: World, any_database: str, what: type) -> None:
    """A server on which an operation ends just now, or a schedule that is being set, is passed
    over: else the two would wait for each other. The next tick takes it."""
    busy, free = (scheduled(world, world.server(name)) for name in ("busy", "free"))
    with locked(what, busy.server_id if what is Server else busy.id):
        assert ticks.run_due(SLOT) == 1
    assert (len(runs(busy)), len(runs(free))) == (0, 1)
    assert ticks.run_due(SLOT) == 1


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_run_that_a_worker_takes_just_now_is_not_given_up(world: World, any_database: str) -> None:
    """Its row is the worker's until it is seen whether it has begun."""
    scheduled(world, world.server())
    ticks.run_due(SLOT)
    [operation] = operations()
    with locked(Operation, operation.seq):
        assert ticks.give_up_missed(SLOT + DAY) == 0
    assert ticks.give_up_missed(SLOT + DAY) == 1


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_two_failures_at_once_both_count(world: World, any_database: str) -> None:
    """A run that fails while beat records that another could not be asked for."""
    schedule = scheduled(world, world.server())
    run = ScheduleRun(schedule_id=schedule.id, slot=SLOT, state="running")
    world.add(run)

    def fail() -> None:
        with transaction() as session:
            session.get_one(Schedule, schedule.id)  # as it was before
            fail_run(session, session.get_one(ScheduleRun, run.id), "for a test")

    with ThreadPoolExecutor() as pool:
        with transaction() as session:
            held = session.get_one(Schedule, schedule.id, with_for_update=True)
            other = pool.submit(fail)
            time.sleep(0.3)  # until it waits; without a lock it would have read by now
            held.failures_in_row += 1
        other.result(30)
    assert now_of(schedule).failures_in_row == 2


# What no worker begins


def given_up(schedule: Schedule, moment: Any) -> list[str]:
    ticks.give_up_missed(moment)
    return [each.state for each in runs(schedule)]


def test_run_that_nobody_begins_is_skipped(world: World, any_database: str) -> None:
    """Its host is away for longer than the window: told then, not when it is back; no failure."""
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT)
    window = 6 * HOUR
    assert given_up(schedule, SLOT + window - HOUR / 3600) == ["running"]
    assert given_up(schedule, SLOT + window) == ["skipped"]

    [operation] = operations()
    assert operation.state == "cancelled"
    assert operation.error and operation.error["code"] == "slot_missed"
    [run] = runs(schedule)
    assert run.reason == operation.error["message"]
    assert "2026-03-10 09:00 UTC" in run.reason
    assert now_of(schedule).failures_in_row == 0
    assert [each["slot"] for each in world.events("image.missed")] == [SLOT.isoformat()]
    assert ticks.run_due(SLOT + DAY) == 1


def test_hosts_away_for_days_leave_one_operation_each(world: World) -> None:
    """However wide the window, the next slot takes the place of the one before."""
    schedule = scheduled(world, world.server(), catch_up_s=7 * 24 * 3600)
    for n in range(4):
        ticks.give_up_missed(SLOT + n * DAY)
        ticks.run_due(SLOT + n * DAY)
    assert [state for _, state in states(schedule)] == ["skipped"] * 3 + ["running"]
    assert [each.state for each in operations()] == ["cancelled"] * 3 + ["queued"]


def test_small_window_leaves_time_to_queue(world: World) -> None:
    """It is about the slot that is missed; a run that waits for its host's others has an hour."""
    schedule = scheduled(world, world.server(), catch_up_s=60)
    ticks.run_due(SLOT + HOUR / 60)
    assert given_up(schedule, SLOT + HOUR) == ["running"]
    assert given_up(schedule, SLOT + HOUR + HOUR / 60) == ["skipped"]


def test_run_that_was_begun_is_not_given_up(world: World, any_database: str) -> None:
    """A copy may take as long as it takes."""
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT)
    world.change(operations()[0].id, state="running")
    assert given_up(schedule, SLOT + DAY) == ["running"]
    assert operations()[0].state == "running"


def test_host_that_is_back_late_copies_nothing(world: World) -> None:
    """Its worker may begin before beat's next tick: it looks for itself."""
    world.handler(images.create, CreateImage.kind)
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT)  # long ago
    runner.run(operations()[0].id)
    [operation], [run] = operations(), runs(schedule)
    assert (operation.state, run.state) == ("cancelled", "skipped")
    assert operation.error and operation.error["code"] == "slot_missed"


def test_image_that_was_begun_in_time_is_made(
    world: World, any_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its worker dies and the next one takes it over after the window."""
    disk = Disk(world, monkeypatch)
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT)
    [operation] = operations()
    window_ends(now() + HOUR)
    disk.dies_at = "committing"
    with pytest.raises(Killed):
        runner.run(operation.id)
    window_ends(now() - HOUR)

    runner.run(operation.id)

    [operation], [run] = operations(), runs(schedule)
    assert (operation.state, operation.attempt, run.state) == ("succeeded", 2, "succeeded")
    with transaction() as session:
        [image] = session.scalars(select(Image))
    assert operation.result and operation.result["image"] == image.id


def window_ends(moment: datetime) -> None:
    """Nobody may begin a run after that moment."""
    with transaction() as session:
        session.execute(update(ScheduleRun).values(give_up_at=moment))


def test_cancelled_queue_wakes_the_next(world: World) -> None:
    """What waits behind a run that is given up is woken."""
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT)
    behind = world.submit(CreateImage(server=schedule.server_id))
    world.clear_outbox()
    ticks.give_up_missed(SLOT + DAY)
    assert world.woken() == [behind]
