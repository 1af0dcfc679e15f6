"""Beat's tick of the schedules: one run per slot, late ones within their window (I5, I6)."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from operations.spine import World, at_once
from schedules.planned import (
    HOUR,
    SLOT,
    end_schedule,
    now_of,
    operations,
    runs,
    scheduled,
    set_plan,
)
from sqlalchemy import select

from services.imager import ticks
from shared import database, errors
from shared.commands import CreateImage
from shared.database import database_now, transaction
from shared.models import Schedule
from shared.operations import claim, drain, runner
from shared.operations.cancel import cancel
from shared.operations.context import Context, Outcome


@pytest.fixture
def schedule(world: World) -> Schedule:
    return scheduled(world, world.server())


def test_slot_runs_once_however_many_ticks(world: World, any_database: str) -> None:
    """Eight beats at the same instant: one run, one operation, one wake-up per schedule."""
    schedules = [scheduled(world, world.server(name)) for name in "abc"]

    started = at_once(*[lambda: ticks.run_due(SLOT)] * 8)

    assert sum(started) == 3
    assert [len(runs(each)) for each in schedules] == [1, 1, 1]
    assert len(operations()) == len(world.woken()) == 3


def test_tick_asks_the_database_for_the_time(
    world: World, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock was put right since it was last compared: what was added is wrong."""
    with transaction() as session:
        row = session.get_one(Schedule, schedule.id)
        row.next_run_at = row.start_at = database_now(session) + 4 * HOUR
    monkeypatch.setattr(database, "_ahead", 8 * HOUR)

    ticks.run_due_schedules()

    assert runs(schedule) == []


def test_tick_between_slots_does_nothing(world: World, schedule: Schedule) -> None:
    """Before the slot, and after it has been claimed, nothing is due."""
    moments = (SLOT - timedelta(microseconds=1), SLOT, SLOT + timedelta(seconds=30), SLOT + HOUR)
    assert [ticks.run_due(moment) for moment in moments] == [0, 1, 0, 0]
    assert now_of(schedule).next_run_at == SLOT + 24 * HOUR


def test_run_is_an_ordinary_operation(world: World, schedule: Schedule) -> None:
    """It creates an image, says who asked, and carries the slot as its key."""
    ticks.run_due(SLOT)
    [operation] = operations()
    [run] = runs(schedule)
    assert (operation.kind, operation.requested_by) == ("image.create", "schedule:daily")
    assert (run.slot, run.state, run.operation_id) == (SLOT, "running", operation.id)
    assert operation.idempotency_key == f"slot:{schedule.id}:{SLOT.isoformat()}"


@pytest.mark.parametrize("late", [timedelta(0), HOUR, 6 * HOUR])
def test_missed_slot_runs_within_its_window(
    world: World, schedule: Schedule, late: timedelta
) -> None:
    """Triptych was down at the slot, and is back before the window ends."""
    assert ticks.run_due(SLOT + late) == 1
    assert [each.state for each in runs(schedule)] == ["running"]


def test_missed_slot_past_its_window_is_skipped(world: World, schedule: Schedule) -> None:
    """It is recorded with the reason and told as an event; the next slot runs."""
    assert ticks.run_due(SLOT + 6 * HOUR + timedelta(seconds=1)) == 0

    [run] = runs(schedule)
    assert (run.state, run.operation_id) == ("skipped", None)
    assert run.reason == "21601 s late, past the window of 21600 s"
    assert [each["slot"] for each in world.events("image.missed")] == [SLOT.isoformat()]
    assert now_of(schedule).failures_in_row == 0

    assert ticks.run_due(SLOT + 24 * HOUR) == 1


def test_of_many_missed_slots_the_newest_runs(
    world: World, schedule: Schedule, any_database: str
) -> None:
    """Down for three days: the newest slot runs once, each older one is recorded as skipped."""
    back = SLOT + 72 * HOUR + HOUR
    assert sum(at_once(*[lambda: ticks.run_due(back)] * 4)) == 1
    states = [(each.slot, each.state) for each in runs(schedule)]
    missed = [(SLOT + n * 24 * HOUR, "skipped") for n in range(3)]
    assert states == [*missed, (SLOT + 72 * HOUR, "running")]
    assert all(each.reason for each in runs(schedule)[:3])
    assert now_of(schedule).next_run_at == SLOT + 96 * HOUR


def test_weekly_slots_are_weekly(world: World) -> None:
    """After Tuesday's slot comes the next Tuesday's."""
    schedule = scheduled(world, world.server(), kind="weekly", weekday="tue")
    assert ticks.run_due(SLOT) == 1
    assert now_of(schedule).next_run_at == SLOT + 7 * 24 * HOUR


def test_repeated_hour_runs_once(world: World) -> None:
    """02:30 comes twice when Berlin's clocks go back; ticks all through the night start one."""
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    zone = {"at": "02:30", "timezone": "Europe/Berlin"}
    schedule = scheduled(world, world.server(), next_run_at=first, **zone)
    started = [ticks.run_due(first + n * timedelta(minutes=10)) for n in range(20)]
    assert sum(started) == len(runs(schedule)) == 1


# While the host drains


def drained(name: str = "kvm-1") -> None:
    with transaction() as session:
        drain.drain(session, name)


def resumed() -> None:
    with transaction() as session:
        drain.resume(session, "kvm-1")


def test_slot_waits_for_its_host(world: World, schedule: Schedule, any_database: str) -> None:
    """A draining host's slot is neither run nor skipped; resumed within its window, it runs. The
    schedules of other hosts run in time."""
    other = scheduled(world, world.server("elsewhere", host="kvm-2"))
    drained()

    assert ticks.run_due(SLOT) == 1
    assert (runs(schedule), len(runs(other))) == ([], 1)
    assert now_of(schedule).next_run_at == SLOT

    resumed()
    assert ticks.run_due(SLOT + 6 * HOUR) == 1
    assert [each.state for each in runs(schedule)] == ["running"]


def test_slots_of_a_long_drain_are_skipped_with_a_true_reason(
    world: World, schedule: Schedule
) -> None:
    """Two days of draining: as after a downtime, and no failure is counted."""
    drained()
    late = SLOT + 31 * HOUR
    assert (ticks.run_due(late), runs(schedule)) == (0, [])
    resumed()
    assert ticks.run_due(late) == 0

    first, second = runs(schedule)
    assert (first.state, first.reason) == ("skipped", ticks.MISSED)
    assert "draining" in ticks.MISSED
    assert (second.state, second.reason) == ("skipped", "25200 s late, past the window of 21600 s")
    assert now_of(schedule).failures_in_row == 0


# What is set by the API


def test_disabled_schedule_never_runs(world: World) -> None:
    """Disabled before its slot, it does not run, and records no miss; enabled again, it goes on
    with the slot after that."""
    server = world.server()
    set_plan(server.id, keep=3)
    set_plan(server.id, keep=3, enabled=False)
    far = datetime(2100, 1, 1, tzinfo=UTC)
    assert (ticks.run_due(far), operations()) == (0, [])

    set_plan(server.id, keep=3)
    with transaction() as session:
        schedule = session.scalars(select(Schedule)).one()
    assert runs(schedule) == []
    assert schedule.next_run_at
    assert schedule.next_run_at > datetime.now(UTC)


def test_schedule_disabled_while_a_tick_reads_it(
    world: World, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the tick's look and its claim the owner wins."""
    real = ticks._claim

    def disable_first(ids: list[str], moment: datetime) -> int:
        set_plan(schedule.server_id, enabled=False)
        return real(ids, moment)

    monkeypatch.setattr(ticks, "_claim", disable_first)
    assert ticks.run_due(SLOT) == 0
    assert [each.state for each in runs(schedule)] == ["skipped"] * len(runs(schedule))
    assert operations() == []


def test_run_that_begins_while_it_is_given_up(world: World, schedule: Schedule) -> None:
    """Between beat's look and its word the worker wins."""
    ticks.run_due(SLOT)
    [operation] = operations()
    assert claim.claim(operation.id, "kvm-1/imager/one")
    assert not ticks._give_up(operation.id, SLOT + HOUR)
    assert world.row(operation.id).state == "running"


def test_schedule_deleted_while_its_run_goes_on(world: World, schedule: Schedule) -> None:
    """The image is made and stays; there is only no run to record it in."""
    ticks.run_due(SLOT)
    [operation] = operations()

    def meanwhile(context: Context, command: Any) -> Outcome:
        end_schedule(schedule.server_id)
        return Outcome({})

    world.handler(meanwhile, CreateImage.kind)
    runner.run(operation.id)
    assert world.row(operation.id).state == "succeeded"


def test_schedule_deleted_while_its_run_waits(world: World, any_database: str) -> None:
    """Nobody wants that image any more: its operation is cancelled, and nothing has failed. What
    the server's other schedule, or a person, has asked for goes on."""
    server = world.server()
    daily = scheduled(world, server, failures_in_row=3)
    scheduled(world, server, kind="weekly", weekday="tue")
    ticks.run_due(SLOT)
    world.submit(CreateImage(server=server.id))
    end_schedule(server.id)
    left = {each.requested_by: each.state for each in operations()}
    assert left == {"schedule:daily": "cancelled", "schedule:weekly": "queued", "test": "queued"}
    assert runs(daily) == []
    assert world.events("schedule.failing") == []
    assert [each["kind"] for each in world.events("schedule.ended")] == ["daily"]


# When a run ends


def end(world: World, schedule: Schedule, number: int, error: Exception | None) -> None:
    """Let the run of the slot of that number end so."""

    def handle(context: Context, command: Any) -> Outcome:
        if error:
            raise error
        return Outcome({"image": f"img_{number}"})

    world.handler(handle, CreateImage.kind)
    assert ticks.run_due(SLOT + number * 24 * HOUR) == 1
    runner.run(operations()[-1].id)


def test_run_names_its_image(world: World, schedule: Schedule) -> None:
    """A run that succeeded says which image it made."""
    end(world, schedule, 0, None)
    [run] = runs(schedule)
    assert (run.state, run.image_id, run.reason) == ("succeeded", "img_0", None)


def test_four_failures_in_a_row_are_told_once(world: World, schedule: Schedule) -> None:
    """Each run says why it failed; the fourth is told loudly; the schedule goes on (I6)."""
    trouble = errors.HostNotAnswering("libvirt is away.")
    for number in range(6):
        end(world, schedule, number, trouble)
        told = [each["failures_in_row"] for each in world.events("schedule.failing")]
        assert told == ([4] if number >= 3 else [])
    assert now_of(schedule).failures_in_row == 6
    assert {(each.state, each.reason) for each in runs(schedule)} == {
        ("failed", "libvirt is away.")
    }


def test_success_ends_the_row_of_failures(world: World, schedule: Schedule) -> None:
    """After it, four more must fail before it is told again."""
    trouble = errors.HostNotAnswering("libvirt is away.")
    for number, error in enumerate([trouble] * 3 + [None] + [trouble] * 4):
        end(world, schedule, number, error)
    assert len(world.events("schedule.failing")) == 1
    assert world.events("schedule.recovered") == []
    assert now_of(schedule).failures_in_row == 4


def test_recovery_is_told_once(world: World, schedule: Schedule, any_database: str) -> None:
    """After a streak that was told: with how many failed and the image that ended it. The next
    streak is told anew."""
    trouble = errors.HostNotAnswering("libvirt is away.")
    ends: list[Exception | None] = [trouble] * 5 + [None, None] + [trouble] * 4 + [None]
    for number, error in enumerate(ends):
        end(world, schedule, number, error)
    recovered = [(e["failures_in_row"], e["image"]) for e in world.events("schedule.recovered")]
    assert recovered == [(5, "img_5"), (4, "img_11")]
    assert [each["schedule"] for each in world.events("schedule.failing")] == ["daily", "daily"]
    assert now_of(schedule).failures_in_row == 0


def test_missed_slots_are_neither(world: World, schedule: Schedule) -> None:
    """A downtime amid a streak of failures does not end it, and is no failure."""
    trouble = errors.HostNotAnswering("libvirt is away.")
    for number in (0, 1, 2):
        end(world, schedule, number, trouble)
    end(world, schedule, 9, trouble)
    assert len(world.events("image.missed")) == 6
    assert [each["failures_in_row"] for each in world.events("schedule.failing")] == [4]


def test_cancelled_run_is_no_success(world: World, schedule: Schedule) -> None:
    """It says that it was cancelled."""
    ticks.run_due(SLOT)
    with transaction() as session:
        cancel(session, operations()[0].id)
    [run] = runs(schedule)
    assert run.state == "failed"
    assert "ancelled" in (run.reason or "")


# Rows that are out of order


def test_forgotten_server_is_refused_and_counted(world: World) -> None:
    """Where its schedule should have survived, the run says why nothing is made."""
    schedule = scheduled(world, world.server(forgotten_at=SLOT))
    assert ticks.run_due(SLOT) == 0
    [run] = runs(schedule)
    assert (run.state, now_of(schedule).failures_in_row) == ("failed", 1)
    assert "registered" in (run.reason or "")
    assert operations() == []


def test_broken_schedule_does_not_stop_the_others(world: World) -> None:
    """A time zone that no longer exists is that schedule's trouble alone."""
    scheduled(world, world.server("broken"), timezone="Mars/Olympus", next_run_at=SLOT - HOUR)
    schedule = scheduled(world, world.server("whole"))
    assert ticks.run_due(SLOT) == 1
    assert len(runs(schedule)) == 1
