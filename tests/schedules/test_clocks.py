"""Clocks that step, rules that change, long silences, and the spread (I5, I6)."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations.spine import World, forget_caches
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
from sqlalchemy import select

from services.imager import ticks
from shared.database import now, transaction
from shared.models import Schedule, ScheduleRun
from shared.runs import TOLD_SINGLY, offset, spread
from shared.slots import next_slot

MINUTE = timedelta(minutes=1)


def test_clock_that_steps_back_runs_no_slot_twice(world: World, any_database: str) -> None:
    """By an hour, over the slot; and by three days, over slots that have their images."""
    schedule = scheduled(world, world.server())
    moments = [SLOT + n * DAY for n in range(3)]
    again = [moments[2] - HOUR, moments[2], *moments, moments[2] + DAY]
    assert [ticks.run_due(each) for each in [*moments, *again]] == [1] * 3 + [0] * 5 + [1]
    assert [slot for slot, _ in states(schedule)] == [SLOT + n * DAY for n in range(4)]


def test_clock_that_was_ahead_puts_nothing_off(world: World, any_database: str) -> None:
    """Ten years ahead for a moment, then right again: the next true slot runs, and those that
    were taken for missed run when they come."""
    schedule = scheduled(world, world.server())
    weekly = scheduled(world, world.server("weekly"), kind="weekly", weekday="tue")
    ticks.run_due(SLOT)
    ticks.run_due(SLOT + 3653 * DAY)
    ahead = now_of(schedule).next_run_at
    assert ahead and ahead > SLOT + 3000 * DAY

    assert ticks.run_due(SLOT + MINUTE) == 0
    assert now_of(schedule).next_run_at == SLOT + DAY
    assert now_of(weekly).next_run_at == SLOT + 7 * DAY
    assert [ticks.run_due(SLOT + n * DAY) for n in range(1, 8)] == [1] * 6 + [2]
    made = [slot for slot, state in states(schedule) if state == "running"]
    assert made[:8] == [SLOT + n * DAY for n in range(8)]


def test_skipped_slot_that_comes_after_all(world: World) -> None:
    """A clock some days ahead had it skipped with a row; that row is the run's now."""
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT + 4 * DAY)
    assert [state for _, state in states(schedule)] == ["skipped"] * 4 + ["running"]
    ticks.run_due(SLOT - HOUR)
    assert [ticks.run_due(SLOT + n * DAY) for n in range(6)] == [1, 1, 1, 1, 0, 1]
    assert [(each.state, each.reason) for each in runs(schedule)] == [("running", None)] * 6


def test_slots_that_have_their_rows_are_missed_once_more(world: World) -> None:
    """After a clock that was ahead beat is away for a day: what was told of them stands, and the
    newest may still run."""
    schedule = scheduled(world, world.server())
    ticks.run_due(SLOT + 4 * DAY)
    before = states(schedule)
    ticks.run_due(SLOT - HOUR)
    assert ticks.run_due(SLOT + 2 * DAY) == 1
    assert states(schedule) == [*before[:2], (SLOT + 2 * DAY, "running"), *before[3:]]


STEPS = st.integers(-4 * 24 * 60, 4 * 24 * 60) | st.integers(-90, 90)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(STEPS, min_size=3, max_size=8), kind=st.sampled_from(["daily", "weekly"]))
def test_whatever_the_clock_does(world: World, steps: list[int], kind: str) -> None:
    """Steps of days and of minutes, both ways; then it is right: from the second slot on each has
    its image, and none has two."""
    weekday = "tue" if kind == "weekly" else None
    schedule = scheduled(world, world.server(f"s{len(operations())}"), kind=kind, weekday=weekday)
    moment = SLOT
    for step in [*steps, 0]:
        moment += step * MINUTE
        ticks.run_due(moment)
    expected = next_slot(kind, "03:00", weekday, "UTC", moment)
    expected = next_slot(kind, "03:00", weekday, "UTC", expected)
    end = moment + 16 * DAY
    while moment < end:
        moment += 4 * HOUR
        ticks.run_due(moment - moment.minute * MINUTE)
    by_slot = {each.slot: each for each in runs(schedule)}
    keys = [each.idempotency_key for each in operations() if each.server_id == schedule.server_id]
    assert len(keys) == len(set(keys))
    while expected < end - DAY:
        assert by_slot[expected].state == "running"
        expected = next_slot(kind, "03:00", weekday, "UTC", expected)


@pytest.mark.parametrize("planned", [-HOUR, HOUR, -11 * HOUR, 11 * HOUR])
def test_rules_of_the_zone_that_have_changed(world: World, planned: timedelta) -> None:
    """Planned under other rules (a new tzdata): it runs where the slot is now, and once."""
    schedule = scheduled(world, world.server(), next_run_at=SLOT + planned, catch_up_s=12 * 3600)
    moments = [SLOT + n * HOUR for n in range(-12, 36)]
    started = [moment for moment in moments if ticks.run_due(moment)]
    assert [max(SLOT, SLOT + planned), SLOT + DAY] == started
    assert [slot for slot, _ in states(schedule)] == [SLOT, SLOT + DAY]


def test_long_silence_is_told_in_few_words(world: World, any_database: str) -> None:
    """After 400 days: the newest runs, two weeks are told slot by slot, the rest at once."""
    schedule = scheduled(world, world.server())
    assert ticks.run_due(SLOT + 400 * DAY) == 1
    older, *single, newest = runs(schedule)
    assert (newest.slot, newest.state) == (SLOT + 400 * DAY, "running")
    assert [each.slot for each in single] == [SLOT + n * DAY for n in range(400 - TOLD_SINGLY, 400)]
    assert (older.first_slot, older.slot) == (SLOT, single[0].slot - DAY)
    assert older.reason == f"{ticks.MISSED} (the same for {400 - TOLD_SINGLY} slots)"
    told = world.events("image.missed")
    assert len(told) == 1 + TOLD_SINGLY
    assert told[0]["first_slot"] == SLOT.isoformat()


# What is set while a slot is due


@pytest.mark.parametrize(
    ("fields", "word"), [({"at": "04:00"}, "changed"), ({"enabled": False}, "disabled")]
)
def test_slot_that_was_due_when_the_schedule_was_set(
    world: World, fields: dict[str, Any], word: str
) -> None:
    """Nobody had taken it yet: it is skipped, and says so."""
    server = world.server()
    due = now().replace(hour=3, minute=0, second=0, microsecond=0)
    due -= timedelta(0) if due < now() else DAY
    schedule = scheduled(world, server, next_run_at=due, start_at=due + 5 * HOUR)
    set_plan(server.id, **fields)
    [run] = runs(schedule)
    assert (run.slot, run.state) == (due, "skipped")
    assert run.reason == f"the schedule was {word} before this run began"
    assert (now_of(schedule).next_run_at is None) == (word == "disabled")


def test_setting_the_same_again_loses_no_slot(world: World) -> None:
    """Only what it keeps was changed."""
    server = world.server()
    due = now().replace(hour=3, minute=0, second=0, microsecond=0) - DAY
    schedule = scheduled(world, server, next_run_at=due)
    set_plan(server.id, keep=3)
    assert (now_of(schedule).next_run_at, runs(schedule)) == (due, [])


def test_schedule_is_changed_when_a_slot_comes_that_ran_by_a_clock_ahead(
    world: World, any_database: str
) -> None:
    """It has its run, and is neither missed nor in the way of the change."""
    server = world.server()
    due = now().replace(hour=3, minute=0, second=0, microsecond=0) - DAY
    schedule = scheduled(world, server, next_run_at=due)
    world.add(ScheduleRun(schedule_id=schedule.id, slot=due, state="succeeded"))
    set_plan(server.id, at="04:00")
    assert states(schedule)[0] == (due, "succeeded")
    assert now_of(schedule).at == "04:00"


def test_schedule_that_is_changed_while_its_run_is_queued(world: World) -> None:
    """The run goes on; the new time has its own, and the old slot no second one."""
    server = world.server()
    schedule = scheduled(world, server)
    ticks.run_due(SLOT)
    with transaction() as session:
        changed = session.get_one(Schedule, schedule.id)
        changed.at, changed.next_run_at, changed.start_at = "04:00", SLOT + HOUR, SLOT + HOUR
    assert [ticks.run_due(SLOT + n * HOUR) for n in range(3)] == [0, 1, 0]
    assert states(schedule) == [(SLOT, "running"), (SLOT + HOUR, "running")]


# The spread


@pytest.fixture
def quarter(world: World, monkeypatch: pytest.MonkeyPatch) -> timedelta:
    monkeypatch.setenv("TRIPTYCH_SCHEDULE_SPREAD", "PT15M")
    forget_caches()
    return timedelta(minutes=15)


def test_servers_start_at_times_of_their_own(world: World, quarter: timedelta) -> None:
    """Always the same, somewhere within the window, and not many at once."""
    names = [f"srv_{n}" for n in range(1500)]
    places = [spread(name) for name in names]
    assert places == [spread(name) for name in names]
    assert timedelta(0) <= min(places) < max(places) < quarter
    a_minute = [sum(place // MINUTE == n for place in places) for n in range(15)]
    assert min(a_minute) > 70 and max(a_minute) < 130


def test_run_starts_in_its_servers_place(
    world: World, quarter: timedelta, any_database: str
) -> None:
    """Not before; its slot stays the nominal one, and it is late only from its start on."""
    schedule = scheduled(world, world.server("other", id="srv_other"), next_run_at=None)
    with transaction() as session:
        changed = session.get_one(Schedule, schedule.id)
        changed.next_run_at, changed.start_at = SLOT, SLOT + spread("srv_other")
    later = offset(now_of(schedule))
    assert timedelta(0) < later < quarter

    assert ticks.run_due(SLOT + later - MINUTE / 60) == 0
    assert ticks.run_due(SLOT + later + 6 * HOUR) == 1
    [run] = runs(schedule)
    assert (run.slot, run.start_at) == (SLOT, SLOT + later)
    following = now_of(schedule)
    assert (following.next_run_at, following.start_at) == (SLOT + DAY, SLOT + DAY + later)


def test_the_api_plans_with_the_spread(world: World, quarter: timedelta) -> None:
    """What it sets begins at the slot's nominal instant and the server's place."""
    server = world.server()
    set_plan(server.id)
    with transaction() as session:
        schedule = session.scalars(select(Schedule)).one()
    assert schedule.next_run_at and schedule.next_run_at > datetime.now(UTC)
    assert offset(schedule) == spread(server.id)


def test_slot_is_claimed_once_where_the_spread_changes(world: World, quarter: timedelta) -> None:
    """Planned without, run with: the next one has the new place, no slot is lost or doubled."""
    schedule = scheduled(world, world.server())
    started = [n for n in range(0, 3 * 24 * 60, 30) if ticks.run_due(SLOT + n * MINUTE)]
    later = spread(schedule.server_id)
    assert started[0] == 0
    assert [n * MINUTE - day * DAY >= later for day, n in enumerate(started)][1:] == [True, True]
    assert [slot for slot, _ in states(schedule)] == [SLOT + n * DAY for n in range(3)]
