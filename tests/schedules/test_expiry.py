"""Snapshots' expiry and the end of undo, by beat's ticks (S2, E1)."""

from datetime import timedelta
from typing import Any

import pytest
from operations.spine import World, at_once, listening, nothing
from sqlalchemy import select

from services.snapshotter import expiry, snapshots
from shared import errors
from shared.commands import DeleteSnapshot, RevertSnapshot, TakeSnapshot
from shared.database import engine, now, transaction
from shared.models import Event, Operation, Server, Snapshot
from shared.operations import claim, runner
from shared.operations.drain import drain
from shared.operations.tasks import forget_due
from shared.settings import settings

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def real_deletion(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshotter's own handler; what it removes is a folder in the test's vault."""
    from shared import recovery  # noqa: F401  registers the journal's actions

    world.handler(snapshots.delete, DeleteSnapshot.kind)


def snapshot(world: World, server: Server, left: timedelta) -> Snapshot:
    """A snapshot of the server with so much time left."""
    made = Snapshot(
        server_id=server.id,
        taken_at=now() - 48 * HOUR + left,
        expires_at=now() + left,
        consistency="crash",
        way="reflink",
        bytes=1,
    )
    world.add(made)
    folder = settings().vault / "snapshots" / server.id / made.id
    folder.mkdir(parents=True)
    return made


def deletions() -> list[Operation]:
    row: Any = Operation
    query = select(Operation).where(row.kind == DeleteSnapshot.kind).order_by(row.seq)
    with transaction() as session:
        return list(session.scalars(query))


def is_gone(made: Snapshot) -> bool:
    with transaction() as session:
        return session.get_one(Snapshot, made.id).deleted_at is not None


def test_warned_once(world: World, any_database: str) -> None:
    """Six hours ahead, however many ticks run at once or later."""
    near, far = (world.server(name) for name in ("near", "far"))
    made = snapshot(world, near, 5 * HOUR)
    snapshot(world, far, 7 * HOUR)

    at_once(*[expiry.warn_of_expiry] * 6)
    expiry.warn_of_expiry()

    assert [each["snapshot"] for each in world.events("snapshot.expiring")] == [made.id]


def test_warned_once_whatever_the_clock_does(
    world: World, any_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put forward, back by days, and forward again; workers that come and go are no different
    from ticks that do: what was told stands in the row."""
    made = snapshot(world, world.server(), 30 * HOUR)
    start = now()
    for hours in (0, 25, -100, 0, 25, 29, -5, 26):
        monkeypatch.setattr(expiry, "now", lambda hours=hours: start + hours * HOUR)
        expiry.warn_of_expiry()
    assert [each["snapshot"] for each in world.events("snapshot.expiring")] == [made.id]


def test_warning_that_comes_too_late_comes_first(world: World) -> None:
    """Beat was down for the last six hours of a snapshot: both are told, in their order."""
    made = snapshot(world, world.server(), -HOUR)
    expiry.expire_due()
    for operation in deletions():
        runner.run(operation.id)
    expiry.expire_due()
    told = [each["snapshot"] for each in world.events("snapshot.expiring")]
    assert told == [each["snapshot"] for each in world.events("snapshot.expired")] == [made.id]
    row: Any = Event
    with transaction() as session:
        types = [each.type for each in session.scalars(select(Event).order_by(row.seq))]
    assert types.index("triptych.snapshot.expiring") < types.index("triptych.snapshot.expired")


def test_expired_snapshot_is_deleted_once(world: World, any_database: str) -> None:
    """Past its time it is deleted and told once, however many ticks run."""
    made = snapshot(world, world.server("due"), -timedelta(seconds=1))
    fresh = snapshot(world, world.server("fresh"), HOUR)

    assert sum(at_once(*[expiry.submit_due] * 4)) == 1
    for operation in deletions():
        runner.run(operation.id)
    assert expiry.submit_due() == 0

    assert (is_gone(made), is_gone(fresh)) == (True, False)
    assert [each["snapshot"] for each in world.events("snapshot.expired")] == [made.id]
    assert [each.state for each in deletions()] == ["succeeded"]


def test_many_expire_at_once(world: World, any_database: str) -> None:
    """Four beats, a dozen snapshots: one deletion of each."""
    made = [snapshot(world, world.server(f"s{n}"), -HOUR) for n in range(12)]
    assert sum(at_once(*[expiry.submit_due] * 4)) == 12
    assert {each.id for each in made} == {each.command["snapshot"] for each in deletions()}
    assert len(deletions()) == 12


def test_message_that_comes_twice_expires_once(world: World) -> None:
    """Delivered again after it was done, and while it is done, it is told once."""
    made = snapshot(world, world.server(), -HOUR)
    expiry.submit_due()
    [operation] = deletions()
    at_once(*[lambda: runner.run(operation.id)] * 4)
    runner.run(operation.id)
    assert [each["snapshot"] for each in world.events("snapshot.expired")] == [made.id]


def test_work_that_holds_a_snapshot_delays_that_one(world: World, any_database: str) -> None:
    """A revert that began before the end goes on with it, and one that waits gets its turn; then
    the snapshot goes. Those of other servers went in the same sweep."""
    server = world.server("reverting")
    held = snapshot(world, server, -HOUR)
    other = snapshot(world, world.server("other"), -HOUR)
    world.handler(nothing, RevertSnapshot.kind)
    reverts = [world.submit(RevertSnapshot(server=server.id)) for _ in range(2)]
    assert claim.claim(reverts[0], "kvm-1/snapshotter/one")

    assert expiry.submit_due() == 2
    for operation in deletions():
        runner.run(operation.id)
    assert (is_gone(held), is_gone(other)) == (False, True)
    assert expiry.submit_due() == 0

    world.clear_outbox()
    world.expire(reverts[0])
    for _ in range(3):  # what ends wakes the next
        for operation_id in [reverts[0], *world.woken()]:
            runner.run(operation_id)
    assert [world.row(each).state for each in reverts] == ["succeeded"] * 2
    assert is_gone(held)


def test_found_by_index(world: World) -> None:
    """On SQLite, which says it: what is due is found, and not looked for among all."""
    snapshot(world, world.server(), -HOUR)
    with listening() as seen:
        expiry.expire_due()
    with engine().connect() as connection:
        plans = [
            step.detail
            for statement in seen
            if statement.startswith(("SELECT snapshot", "UPDATE snapshot SET warned_at"))
            for step in connection.exec_driver_sql(
                f"EXPLAIN QUERY PLAN {statement}", (None,) * statement.count("?")
            )
        ]
    used = " ".join(plans)
    assert "snapshot_unwarned (expires_at<?)" in used
    assert "snapshot_due (expires_at<?)" in used
    assert not [each for each in plans if each.startswith("SCAN")]


def test_snapshots_of_a_draining_host_expire(world: World) -> None:
    """Housekeeping goes on while it has workers, however long that is."""
    made = snapshot(world, world.server(), -HOUR)
    with transaction() as session:
        drain(session, "kvm-1")
    assert expiry.submit_due() == 1
    runner.run(deletions()[0].id)
    assert is_gone(made)


def test_one_deletion_is_asked_for_at_a_time(world: World) -> None:
    """While it waits behind other work of its server, or goes on, no second one is queued."""
    server = world.server()
    snapshot(world, server, -HOUR)
    assert [expiry.submit_due(), expiry.submit_due(), expiry.submit_due()] == [1, 0, 0]
    assert claim.claim(deletions()[0].id, "kvm-1/snapshotter/one")
    assert expiry.submit_due() == 0


def test_snapshot_that_goes_while_it_is_looked_for(world: World) -> None:
    """A person's deletion came between the look and the asking: nothing is left to ask for."""
    made = snapshot(world, world.server(), -HOUR)
    with transaction() as session:
        session.get_one(Snapshot, made.id).deleted_at = now()
    assert expiry._ask([made.id]) == 0
    assert deletions() == []


def test_deletion_that_failed_is_asked_for_again(world: World) -> None:
    """A snapshot past its time does not stay because one attempt went wrong; nor is it tried at
    each tick, which would make an operation and an event a minute."""
    snapshot(world, world.server(), -HOUR)
    expiry.submit_due()
    world.change(deletions()[0].id, state="failed", finished_at=now())
    assert expiry.submit_due() == 0
    world.change(deletions()[0].id, finished_at=now() - expiry.TRY_AGAIN)
    assert expiry.submit_due() == 1


def test_deletion_that_failed_in_the_future_puts_nothing_off(world: World) -> None:
    """A clock was ahead by days, and is right again."""
    snapshot(world, world.server(), -HOUR)
    expiry.submit_due()
    world.change(deletions()[0].id, state="failed", finished_at=now() + 72 * HOUR)
    assert expiry.submit_due() == 1


def test_late_deletion_spares_the_replacement(world: World) -> None:
    """Expired and queued behind a take with `replace`: the new snapshot is not deleted, and
    nothing is told of it."""
    server = world.server()
    old = snapshot(world, server, -HOUR)
    expiry.submit_due()
    with transaction() as session:
        session.get_one(Snapshot, old.id).deleted_at = now()
    new = snapshot(world, server, 48 * HOUR)

    [operation] = deletions()
    runner.run(operation.id)

    assert world.row(operation.id).state == "succeeded"
    assert not is_gone(new)
    assert world.events("snapshot.expired") == []


def test_persons_deletion_means_what_they_saw(world: World) -> None:
    """A delete names, at admission, the snapshot that there is; a later one is not meant."""
    server = world.server()
    seen = snapshot(world, server, HOUR)
    operation = world.submit(DeleteSnapshot(server=server.name))
    with transaction() as session:
        session.get_one(Snapshot, seen.id).deleted_at = now()
    later = snapshot(world, server, 48 * HOUR)
    runner.run(operation)
    assert not is_gone(later)


def test_forgotten_server_does_not_stop_expiry(world: World) -> None:
    """Its snapshot goes like any other, and so do those of the other servers."""
    forgotten = snapshot(world, world.server("forgotten", forgotten_at=now()), -HOUR)
    other = snapshot(world, world.server("other"), -HOUR)
    assert expiry.submit_due() == 2
    for operation in deletions():
        runner.run(operation.id)
    assert is_gone(forgotten)
    assert is_gone(other)


@pytest.mark.parametrize("error", [errors.ServerNotFound("No such server."), KeyError("a mistake")])
def test_refused_deletion_does_not_stop_expiry(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever one deletion is refused for, the others of its page are asked for, once each."""
    real = expiry.queue

    def refuse(session: Any, admitted: Any, *about: Any) -> Any:
        if admitted.server.id == broken.id:
            raise error
        return real(session, admitted, *about)

    servers = [world.server(f"s{n}") for n in range(9)]
    for server in servers:
        snapshot(world, server, -HOUR)
    broken = servers[4]
    monkeypatch.setattr(expiry, "queue", refuse)
    assert [expiry.submit_due(), expiry.submit_due()] == [8, 0]
    assert {each.server_id for each in deletions()} == {each.id for each in servers} - {broken.id}


def test_many_pages(world: World, monkeypatch: pytest.MonkeyPatch, any_database: str) -> None:
    """More than are warned of and asked for in one transaction, by two beats at once."""
    monkeypatch.setattr(expiry, "PAGE", 3)
    made = [snapshot(world, world.server(f"s{n}"), -HOUR) for n in range(11)]
    at_once(*[expiry.expire_due] * 2)
    expiry.expire_due()  # what one had while the other passed it over
    ids = sorted(each.id for each in made)
    assert sorted(each["snapshot"] for each in world.events("snapshot.expiring")) == ids
    assert sorted(each.command["snapshot"] for each in deletions()) == ids


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_what_somebody_is_at_keeps_no_other_waiting(world: World, any_database: str) -> None:
    """While another transaction has one snapshot's row, the others are asked for; it is later. So
    are warnings.
    On SQLite one writer has all rows."""
    taken, free = (snapshot(world, world.server(name), -HOUR) for name in ("taken", "free"))
    with transaction() as session:
        session.get_one(Snapshot, taken.id, with_for_update=True)
        assert [*at_once(expiry.warn_of_expiry), *at_once(expiry.submit_due)] == [1, 1]
    assert [each.command["snapshot"] for each in deletions()] == [free.id]
    assert expiry.submit_due() == 1


# The end of undo


def reverted(world: World, server: Server, until: timedelta) -> str:
    """A revert that succeeded, and can be undone for so long."""
    operation = world.submit(TakeSnapshot(server=server.id))
    world.change(
        operation,
        kind="snapshot.revert",
        state="succeeded",
        undo={"live": {}, "previous": "<domain/>"},
        undo_until=now() + until,
    )
    return operation


def forgets() -> list[str]:
    row: Any = Operation
    query = select(Operation).where(row.kind == "snapshot.revert.forget")
    with transaction() as session:
        return [each.command["operation"] for each in session.scalars(query)]


def test_what_was_set_aside_is_forgotten_when_due(world: World) -> None:
    """After its time, once, and not before."""
    due = reverted(world, world.server("due"), -HOUR)
    reverted(world, world.server("fresh"), HOUR)
    forget_due()
    forget_due()
    assert forgets() == [due]


def test_forgotten_set_aside_is_done_with(world: World) -> None:
    """Once forgotten it can no longer be undone, and is not asked for again."""
    due = reverted(world, world.server("due"), -HOUR)
    world.handler(snapshots.forget, "snapshot.revert.forget")
    forget_due()
    with transaction() as session:
        row: Any = Operation
        query = select(Operation).where(row.kind == "snapshot.revert.forget")
        operation = session.scalars(query).one().id
    runner.run(operation)
    forget_due()
    assert (world.row(due).undo, world.row(due).undo_until) == (None, None)
    assert forgets() == [due]
