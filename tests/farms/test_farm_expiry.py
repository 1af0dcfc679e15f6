"""The end of farms, by beat's ticks: warned of once, deleted once, found by index."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from operations.spine import HOST, World, at_once, listening
from sqlalchemy import select

from services.cloner import removal, ticks
from shared import farms
from shared.commands import CreateClones, DeleteFarm, RetryFarm, StopFarm
from shared.database import engine, now, transaction
from shared.models import Clone, Event, Farm, Operation
from shared.operations import claim, holds, runner
from shared.operations.context import Outcome
from shared.operations.drain import drain
from shared.operations.finish import finish

HOUR = timedelta(hours=1)


def farm(world: World, name: str, left: timedelta, hours: float = 8) -> Farm:
    """A farm of failed clones, which need no libvirt, with so much of its time left; it was warned
    of if none is."""
    source = world.server(f"source-of-{name}")
    made = Farm(
        name=name,
        host=HOST,
        server_id=source.id,
        operation_id="op_x",
        command={"source": {"kind": "server", "id": source.id}, "name": name},
    )
    farms.let_end(made, hours, now() + left - hours * HOUR)
    if left < timedelta(0):
        made.warned_at = made.expires_at
    clone = Clone(
        farm_id=made.id,
        operation_id="op_x",
        host=HOST,
        name=f"{name}-1",
        source_kind="server",
        source_id=source.id,
        state="failed",
    )
    world.add(made, clone)
    return made


def deletions() -> list[Operation]:
    row: Any = Operation
    query = select(Operation).where(row.kind == DeleteFarm.kind).order_by(row.seq)
    with transaction() as session:
        return list(session.scalars(query))


def current(made: Farm) -> Farm:
    with transaction() as session:
        return session.get_one(Farm, made.id)


def warned(world: World) -> list[str]:
    return [each["farm"] for each in world.events("farm.expiring")]


@pytest.fixture(autouse=True)
def real_deletion(world: World) -> None:
    world.handler(removal.delete, DeleteFarm.kind)


def test_warned_once(world: World, any_database: str) -> None:
    """An hour ahead, however many ticks run at once or later."""
    near = farm(world, "near", timedelta(minutes=59))
    farm(world, "far", timedelta(minutes=61))
    at_once(*[ticks.look_at_due] * 6)
    ticks.look_at_due()
    assert warned(world) == [near.id]
    assert deletions() == []


def test_short_lives_are_warned_of_in_their_last_quarter(world: World) -> None:
    """One of an hour would else be warned of when it is made."""
    early = farm(world, "early", timedelta(minutes=16), hours=1)
    late = farm(world, "late", timedelta(minutes=14), hours=1)
    ticks.look_at_due()
    assert warned(world) == [late.id]
    assert current(early).due_at == current(early).expires_at - timedelta(minutes=15)  # type: ignore[operator]


def test_deleted_once_when_its_time_is_over(world: World, any_database: str) -> None:
    """Told as expired, and looked at no more."""
    made, fresh = farm(world, "due", -HOUR), farm(world, "fresh", 5 * HOUR)
    assert sum(at_once(*[ticks.look_at_due] * 4)) == 1
    assert ticks.look_at_due() == 0
    (operation,) = deletions()
    assert operation.requested_by == "beat:expiry"
    runner.run(operation.id)

    assert current(made).deleted_at is not None
    assert current(made).due_at is None
    assert current(fresh).deleted_at is None
    row: Any = Event
    with transaction() as session:
        told = [each.type for each in session.scalars(select(Event).order_by(row.seq))]
    ours = [each.removeprefix("triptych.") for each in told if "farm" in each]
    assert ours == ["farm.expired"]


@pytest.mark.parametrize(("late_min", "left_min"), [(600, 30), (50, 30), (20, 40)])
def test_late_warning_leaves_time(
    world: World, any_database: str, late_min: int, left_min: int
) -> None:
    """After an outage half of what is between warning and end is left; the warning names it."""
    made = farm(world, "late", timedelta(minutes=60 - late_min))
    with transaction() as session:
        session.get_one(Farm, made.id).warned_at = None
    assert sum(at_once(*[ticks.look_at_due] * 4)) == 0
    end = current(made).expires_at
    assert end is not None
    assert abs(end - now() - timedelta(minutes=left_min)) < timedelta(minutes=1)
    (warning,) = world.events("farm.expiring")
    assert warning["expires_at"] == end.isoformat()
    assert current(made).due_at == end
    with transaction() as session:  # that time is over
        session.get_one(Farm, made.id).expires_at = now()
    let_look(made)
    assert ticks.look_at_due() == 1
    assert len(warned(world)) == 1


def test_many_end_at_once(world: World, any_database: str) -> None:
    """Four beats, a dozen farms: one deletion of each."""
    made = [farm(world, f"f{n}", -HOUR) for n in range(12)]
    assert sum(at_once(*[ticks.look_at_due] * 4)) == 12
    assert sorted(each.id for each in made) == sorted(e.command["farm"] for e in deletions())
    assert warned(world) == []


def test_tried_again_after_a_while(world: World) -> None:
    """A deletion that left something is asked for again, not at each tick, and never twice at
    the same time."""
    made = farm(world, "stubborn", -HOUR)
    assert ticks.look_at_due() == 1
    first = deletions()[0].id
    world.change(first, state="failed", finished_at=now())
    assert ticks.look_at_due() == 0
    let_look(made)
    assert ticks.look_at_due() == 1
    let_look(made)
    assert ticks.look_at_due() == 0
    assert warned(world) == []


def let_look(made: Farm) -> None:
    with transaction() as session:
        session.get_one(Farm, made.id).due_at = now()


def test_more_time_while_its_deletion_waits(world: World, any_database: str) -> None:
    """The deletion that was asked for finds that it is not meant any more; the new end has a
    warning of its own."""
    made = farm(world, "extended", -HOUR)
    ticks.look_at_due()
    with transaction() as session:
        farms.let_end(session.get_one(Farm, made.id), 2, now())
    runner.run(deletions()[0].id)
    ended = world.row(deletions()[0].id)
    assert (ended.state, ended.result and ended.result["clones"]) == ("succeeded", [])
    assert current(made).deleted_at is None
    with transaction() as session:
        farms.let_end(session.get_one(Farm, made.id), 2, now() - 1.6 * HOUR)
    ticks.look_at_due()
    assert warned(world) == [made.id]


def test_person_s_deletion_does_not_ask_for_the_time(world: World) -> None:
    """Only beat's is for farms whose time is over."""
    made = farm(world, "wanted", 5 * HOUR)
    runner.run(world.submit(DeleteFarm(farm=made.id)))
    assert current(made).deleted_at is not None
    assert [each["farm"] for each in world.events("farm.deleted")] == [made.id]


def test_farms_without_an_end_are_not_looked_at(world: World) -> None:
    """Nor those that are gone."""
    for name in ("endless", "gone"):
        made = farm(world, name, -HOUR)
        with transaction() as session:
            row = session.get_one(Farm, made.id)
            if name == "endless":
                farms.let_end(row, None, now())
            else:
                row.deleted_at, row.due_at = now(), None
    assert ticks.look_at_due() == 0
    assert warned(world) == []


def test_refused_deletion_does_not_stop_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one is refused for, the others are asked for; it is tried at the next tick."""
    real = ticks.submit

    def refuse_first(session: Any, command: Any, **options: Any) -> Any:
        if command.farm == broken.id:
            raise KeyError("a mistake")
        return real(session, command, **options)

    broken = farm(world, "broken", -2 * HOUR)
    farm(world, "whole", -HOUR)
    monkeypatch.setattr(ticks, "submit", refuse_first)
    assert ticks.look_at_due() == 1
    monkeypatch.setattr(ticks, "submit", real)
    assert ticks.look_at_due() == 1


def test_draining_hosts_farms_end_too(world: World) -> None:
    """Housekeeping goes on while the host has workers."""
    farm(world, "due", -HOUR)
    with transaction() as session:
        drain(session, HOST)
    assert ticks.look_at_due() == 1


def test_found_by_index(world: World) -> None:
    """On SQLite, which says it: what is due is found, and not looked for among all."""
    for n in range(3):
        farm(world, f"f{n}", 5 * HOUR)
    with listening() as seen:
        ticks.look_at_due()
    with engine().connect() as connection:
        plans = [
            step.detail
            for statement in seen
            if statement.startswith("SELECT farm.id \n")
            for step in connection.exec_driver_sql(
                f"EXPLAIN QUERY PLAN {statement}", (None,) * statement.count("?")
            )
        ]
    assert "farm_due (due_at<?)" in " ".join(plans)
    assert not [each for each in plans if each.startswith("SCAN farm")]


def test_cost_follows_what_is_due(world: World) -> None:
    """A hundred farms whose time is not near ask nothing of the database, tick by tick."""
    for n in range(20):
        farm(world, f"f{n}", 5 * HOUR)
    ticks.look_at_due()  # each has its next look set
    with listening() as seen:
        ticks.look_at_due()
    assert len([each for each in seen if each.startswith(("SELECT", "UPDATE"))]) == 1


# When its time begins


def clones(world: World, **fields: Any) -> str:
    server = world.server()
    source = {"kind": "server", "id": server.id}
    return world.submit(CreateClones.model_validate({"source": source, **fields}))


def only_farm() -> Farm:
    with transaction() as session:
        return session.scalars(select(Farm)).one()


def made(names: list[str]) -> Any:
    """A handler that makes the clones of these names, and fails the others."""

    def handler(context: Any, command: Any) -> Outcome:
        def apply(session: Any) -> None:
            row: Any = Clone
            for clone in session.scalars(select(Clone).where(row.operation_id == context.id)):
                clone.state = "ready" if clone.name in names else "failed"

        return Outcome({}, apply)

    return handler


def test_time_begins_when_the_farm_is_made(world: World, any_database: str) -> None:
    """Not when it was asked for: it may have waited for hours. A farm of which nothing was made
    has no end."""
    operation = clones(world, name="qa-{n}", count=2, expires_in_h=8)
    assert only_farm().expires_at is None
    world.handler(made(["qa-1"]), CreateClones.kind)
    runner.run(operation)
    ended = world.row(operation)
    assert only_farm().expires_at == ended.finished_at + 8 * HOUR  # type: ignore[operator]


def test_retry_leaves_the_end_as_it_is(world: World) -> None:
    """And takes the failed clones alone; one that made the first gives the farm its end."""
    operation = clones(world, name="qa-{n}", count=3, expires_in_h=8)
    world.change(operation, state="running", owner="kvm-1/cloner/one")
    with transaction() as session:
        row: Any = Operation
        finish(
            session, session.scalars(select(Operation).where(row.id == operation)).one(), "failed"
        )
    assert only_farm().expires_at is None
    world.handler(made(["qa-2"]), RetryFarm.kind)
    runner.run(world.submit(RetryFarm(farm="qa-{n}")))
    end = only_farm().expires_at
    assert end is not None

    again = world.submit(RetryFarm(farm="qa-{n}"))
    with transaction() as session:
        states = {each.name: each.state for each in session.scalars(select(Clone))}
        taken = {e.name for e in session.scalars(select(Clone)) if e.operation_id == again}
    assert states == {"qa-1": "queued", "qa-2": "ready", "qa-3": "queued"}
    assert taken == {"qa-1", "qa-3"}
    world.handler(made(["qa-1", "qa-3"]), RetryFarm.kind)
    runner.run(again)
    assert only_farm().expires_at == end


def test_hold_keeps_a_server_s_line_still(world: World, any_database: str) -> None:
    """Claims wait for whoever holds the server, and are woken when that ends."""
    held, busy = world.server("held"), world.server("busy")
    made_farm = farm(world, "f", 5 * HOUR)
    operation = world.submit(StopFarm(farm=made_farm.id))
    owner = "kvm-1/cloner/one"
    assert claim.claim(operation, owner)
    queued = world.snapshot_of(busy)
    with transaction() as session:
        blocked = holds.hold(session, operation, [held.id, busy.id])
    assert blocked == {busy.id: queued}

    later = world.snapshot_of(held)
    assert claim.claim(later, "kvm-1/snapshotter/one") is None
    assert claim.claim(queued, "kvm-1/snapshotter/two")
    other = world.submit(StopFarm(farm=made_farm.id))
    with transaction() as session:
        assert holds.hold(session, other, [held.id]) == {held.id: operation}
        # The same operation's next attempt holds what it held, whatever is queued by now.
        assert holds.hold(session, operation, [held.id]) == {}
    world.clear_outbox()
    with transaction() as session:
        finish(session, claim.held(session, operation, owner), "succeeded")
    assert later in world.woken()
    assert claim.claim(later, "kvm-1/snapshotter/one")
