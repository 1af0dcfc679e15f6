"""After a restored backup, nothing of the past is done or undone."""

from datetime import timedelta

import pytest
from operations.spine import World
from sqlalchemy import select

from shared import errors
from shared.commands import CreateImage
from shared.database import now, transaction
from shared.models import Farm, Schedule, ScheduleRun
from shared.operations import journal
from shared.operations.abandon import abandon, postpone


def abandoned() -> list[str]:
    with transaction() as session:
        return [each.id for each in abandon(session)]


@pytest.mark.parametrize(("hours", "left"), [(1.0, 24), (48.0, 48), (None, None)])
def test_farms_have_their_time_anew(
    world: World, any_database: str, hours: float | None, left: int | None
) -> None:
    """Their ends may have been put off since the backup, and beat deletes at once."""
    past = now() - timedelta(hours=3)
    ends = {"expires_in_h": hours, "expires_at": past, "due_at": past, "warned_at": past}
    with transaction() as session:
        server = world.server()
        session.add(
            Farm(
                id="frm_1",
                name="qa",
                host="kvm-1",
                operation_id="op_1",
                server_id=server.id,
                **(ends if hours else {}),
            )
        )
        session.add(
            Farm(
                id="frm_2",
                name="old",
                host="kvm-1",
                operation_id="op_1",
                server_id=server.id,
                deleted_at=past,
                expires_at=past,
            )
        )

    with transaction() as session:
        assert [each.id for each in postpone(session)] == (["frm_1"] if hours else [])

    with transaction() as session:
        farm = session.get_one(Farm, "frm_1")
        if left is None:
            assert farm.expires_at is None
        else:
            assert farm.expires_at
            assert abs(farm.expires_at - now() - timedelta(hours=left)) < timedelta(minutes=2)
            assert (farm.expires_in_h, farm.warned_at) == (left, None)
        assert session.get_one(Farm, "frm_2").expires_at == past


def test_what_was_queued_fails(world: World, any_database: str) -> None:
    """Queued operations end with a reason, and no worker is woken for any of them."""
    server = world.server()
    first, second = world.snapshot_of(server), world.snapshot_of(server)

    assert [first, second] == abandoned()
    assert [world.row(each).state for each in (first, second)] == ["failed", "failed"]
    error = world.row(first).error
    assert error
    assert error["code"] == "database_restored"
    assert world.woken() == []
    assert [first, second] == [each["operation"] for each in world.events("operation.failed")]


def test_what_was_running_is_not_undone(world: World, any_database: str) -> None:
    """The journal of a dead attempt is forgotten: its disks have changed since."""
    operation = world.snapshot_of(world.server())
    world.change(operation, state="running", owner="kvm-1/snapshotter/x")
    world.expire(operation)
    with transaction() as session:
        journal.write(session, operation, "undo", "note", step="swap back")

    assert [operation] == abandoned()
    assert world.journal(operation) == []
    assert world.played == []


def test_what_was_committed_is_left_to_its_worker(world: World) -> None:
    """Past the commit there is only something to remove, and its worker does it."""
    operation = world.snapshot_of(world.server())
    world.change(operation, state="running", committed=True)
    world.expire(operation)
    with transaction() as session:
        journal.write(session, operation, "redo", "note", step="remove")

    assert abandoned() == []
    assert (
        world.row(operation).state,
        world.journal(operation),
    ) == ("running", [("redo", "remove")])


def test_a_worker_at_it_stops_it(world: World) -> None:
    """While a worker holds a lease nothing at all is changed."""
    waiting, running = world.snapshot_of(world.server()), world.snapshot_of(world.server("db"))
    world.change(running, state="running")
    world.expire(running, seconds=-60)

    with pytest.raises(errors.ServerBusy, match="stop all workers"):
        abandoned()
    assert world.row(waiting).state == "queued"


def test_a_schedule_learns_of_it(world: World) -> None:
    """A run whose image was being made counts as failed, with the reason."""
    server = world.server()
    schedule = Schedule(
        server_id=server.id, kind="daily", at="03:00", timezone="UTC", keep=7, catch_up_s=0
    )
    world.add(schedule)
    operation = world.submit(CreateImage(server=server.id))
    world.add(
        ScheduleRun(schedule_id=schedule.id, slot=now(), state="running", operation_id=operation)
    )
    abandoned()
    with transaction() as session:
        run = session.scalars(select(ScheduleRun)).one()
        assert run.state == "failed"
        assert "backup" in (run.reason or "")
