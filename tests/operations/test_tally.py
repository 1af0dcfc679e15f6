"""What ended operations are counted as, for the counters of /metrics."""

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from operations.spine import World, at_once, nothing
from sqlalchemy import delete, select

from shared.commands import CreateClones
from shared.database import now, reading, transaction
from shared.models import Event, Operation, Tally
from shared.operations import runner
from shared.operations.cancel import cancel
from shared.operations.finish import finish


def tallies(measure: str) -> dict[tuple[str, ...], float]:
    """By host, service, kind, and those of label and bucket that are not empty."""
    row: Any = Tally
    with reading() as session:
        found = list(session.scalars(select(Tally).where(row.measure == measure)))
    return {
        tuple(filter(None, (each.host, each.service, each.kind, each.label, each.bucket))): (
            round(each.value, 6)
        )
        for each in found
    }


def end(operation: str, state: str = "succeeded", seconds: float = 3.0, **fields: Any) -> None:
    """End a running operation that took that long."""
    row: Any = Operation
    with transaction() as session:
        found = session.scalars(select(Operation).where(row.id == operation)).one()
        found.sqlmodel_update({"started_at": now() - timedelta(seconds=seconds), **fields})
        finish(session, found, state)


TAKE = ("kvm-1", "snapshotter", "snapshot.take")


def test_counted_once_when_it_ends(world: World, any_database: str) -> None:
    """By host, service, kind and state; a second delivery of the message counts nothing."""
    world.handler(nothing)
    for name in ("a", "b"):
        operation = world.snapshot_of(world.server(name))
        runner.run(operation)
        runner.run(operation)
    assert {(*TAKE, "succeeded"): 2} == tallies("operations")
    took = {key: count for key, count in tallies("duration").items() if key[-1] != "sum"}
    assert {key[:-1] for key in took} == {(*TAKE, "succeeded")}
    assert sum(took.values()) == 2


def test_not_counted_when_ending_it_fails(world: World, any_database: str) -> None:
    """What is rolled back was not counted."""
    operation = world.snapshot_of(world.server())
    with pytest.raises(KeyboardInterrupt), transaction() as session:
        row: Any = Operation
        found = session.scalars(select(Operation).where(row.id == operation)).one()
        finish(session, found, "failed")
        raise KeyboardInterrupt
    assert tallies("operations") == {}


def test_cancelled_in_the_queue_has_no_duration(world: World, any_database: str) -> None:
    """It is counted as cancelled, and never began."""
    operation = world.snapshot_of(world.server())
    with transaction() as session:
        cancel(session, operation)
    assert {(*TAKE, "cancelled"): 1} == tallies("operations")
    assert tallies("duration") == {}


def test_duration_and_pause(world: World, any_database: str) -> None:
    """Each in the bucket that it falls into, and in the sum; a pause of none is not one."""
    server = world.server()
    end(world.snapshot_of(server), seconds=3, result={"pause_ms": 9.5})
    end(world.snapshot_of(server), seconds=3, result={"pause_ms": 0.0})
    end(world.snapshot_of(server), seconds=90_000, state="failed")
    durations = tallies("duration")
    assert durations[*TAKE, "succeeded", "5.0"] == 2
    assert durations[*TAKE, "succeeded", "sum"] == pytest.approx(6, abs=2)
    assert durations[*TAKE, "failed", "+Inf"] == 1
    assert {(*TAKE, "0.01"): 1, (*TAKE, "sum"): 0.0095} == tallies("pause")


def test_bytes_by_way(world: World, any_database: str) -> None:
    """Those of the copy; of a farm, those of all its clones."""
    server = world.server()
    end(world.snapshot_of(server), bytes_done=100, result={"way": "reflink"})
    end(world.snapshot_of(server), bytes_done=10, result={"way": "reflink"})
    end(world.snapshot_of(server), bytes_done=10, result={"snapshot": "snp_1"})
    assert {(*TAKE, "reflink"): 110} == tallies("bytes")
    farm = CreateClones(source={"kind": "server", "id": server.id}, name="qa-{n}", count=3)
    ways = [{"way": "stream"}, {"way": "stream"}, {"way": None}]
    end(world.submit(farm), bytes_done=7, result={"clones": ways, "pause_ms": None})
    assert tallies("bytes")["kvm-1", "cloner", "clone.create", "stream"] == 7


def test_pruning_takes_nothing_away(world: World, any_database: str) -> None:
    """Old operations may be deleted; what they were counted as stays."""
    end(world.snapshot_of(world.server()))
    before = tallies("operations")
    with transaction() as session:
        session.execute(delete(Event))
        session.execute(delete(Operation))
    assert {(*TAKE, "succeeded"): 1} == before == tallies("operations")


def test_ended_at_once(world: World, any_database: str) -> None:
    """Operations of one kind that end at the same moment are all counted."""
    operations = [world.snapshot_of(world.server(f"server-{n}")) for n in range(8)]
    at_once(*(partial(end, each) for each in operations))
    assert {(*TAKE, "succeeded"): 8} == tallies("operations")
