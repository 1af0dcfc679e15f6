"""Real Celery workers on a real Redis: messages twice, nonsense, and workers that are killed."""

import itertools
from typing import Any
from uuid import uuid4

import pytest
from operations.spine import Broker, World, wait_for
from operations.workers import Worker, ask, ended, working
from sqlalchemy import func, select

from shared import commands
from shared.celery_app import publisher
from shared.commands import TakeSnapshot
from shared.database import reading, transaction
from shared.models import Operation
from shared.operations import outbox, reconcile
from shared.settings import settings

QUEUE = "snapshots.kvm-1"


def test_each_message_is_done_once_whatever_else_comes(worker: Worker, world: World) -> None:
    """Duplicates, unknown operations and tasks, nonsense and refused commands: the work of
    each operation is done once, and the worker goes on (E4)."""
    operation = ask(world, "one")
    for _ in range(4):
        publisher().send_task("snapshotter.take", [], {"operation_id": operation}, queue=QUEUE)
    for arguments in ({"operation_id": "op_none"}, {"operation_id": [1]}, {"server": "none"}, {}):
        publisher().send_task("snapshotter.take", [], arguments, queue=QUEUE)
    publisher().send_task("snapshotter.no_such_task", queue=QUEUE)
    publisher().send_task("snapshotter.take", ["too", "many", "arguments"], queue=QUEUE)
    direct, message_id = world.server("direct"), str(uuid4())
    for _ in range(3):
        publisher().send_task(
            "snapshotter.take", [], {"server": direct.name}, queue=QUEUE, task_id=message_id
        )

    last = ask(world, "last", "fail")

    assert ended(world, operation).state == "succeeded"
    assert ended(world, last).state == "failed"
    wait_for(lambda: len(worker.did()) >= 4)  # three runs, one of them undone
    with transaction() as session:
        rows = list(session.scalars(select(Operation)))
    runs = [line.split()[1] for line in worker.did() if line.startswith("run")]
    assert {row.id for row in rows} == set(runs)
    assert 3 == len(rows) == len(runs)


def test_killed_child_is_succeeded(worker: Worker, world: World) -> None:
    """The pool replaces a child that was killed; the operation is undone, and done, by the new
    one, without waiting for beat or for the lease."""
    operation = ask(world, "one", "die")

    row = ended(world, operation)

    assert (row.state, row.attempt) == ("succeeded", 2)
    first, undone, second = worker.did()
    assert undone == "undo attempt 1"
    assert first.split()[2] != second.split()[2], "another process"


def test_killed_worker_is_succeeded(worker: Worker, world: World, redis_broker: Broker) -> None:
    """The whole worker killed, its messages gone, and started again at once."""
    operation = ask(world, "one", "slow")
    wait_for(worker.did)
    worker.kill()
    redis_broker.client.flushall()
    (worker.vault / "go").touch()
    worker.start()

    row = ended(world, operation)

    assert (row.state, row.attempt) == ("succeeded", 2)
    assert len([line for line in worker.did() if line.startswith("undo")]) == 1
    wait_for(lambda: not list((worker.vault / ".workers").iterdir()))


def test_broker_that_restarts_without_its_memory(
    worker: Worker, world: World, redis_broker: Broker
) -> None:
    """Work under way ends, the worker reads its queue again, and what waited is sent anew."""
    under_way = ask(world, "one", "slow")
    wait_for(worker.did)
    redis_broker.stop()
    waiting = world.snapshot_of(world.server("two"))
    (worker.vault / "go").touch()
    assert ended(world, under_way).state == "succeeded"

    redis_broker.start()
    world.change(waiting, woken_at=world.row(waiting).created_at - 2 * reconcile.WAKE_AGAIN_AFTER)
    reconcile.reconcile()

    assert ended(world, waiting).state == "succeeded"


def test_line_of_a_server_is_walked_by_wake_ups_alone(worker: Worker, world: World) -> None:
    """Each end wakes the next one, on several processes, without beat (E3)."""
    server = world.server("one")
    line = [
        world.submit(TakeSnapshot(server=server.id, description=what))
        for what in ("work", "fail", "die", "work", "work")
    ]
    outbox.flush()

    states = [ended(world, each).state for each in line]

    assert ["succeeded", "failed", *["succeeded"] * 3] == states
    times = [(world.row(each).started_at, world.row(each).finished_at) for each in line]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))  # type: ignore[operator]


def test_message_for_another_host_does_nothing(
    worker: Worker, world: World, redis_broker: Broker
) -> None:
    """On the wrong host's queue an operation is left as it is, and a whole command becomes an
    operation whose wake-up goes to the right one."""
    foreign = world.snapshot_of(world.server("foreign", host="kvm-2"))
    world.clear_outbox()
    command = {"server": world.server("elsewhere", host="kvm-2").id}
    for arguments in ({"operation_id": foreign}, command):
        publisher().send_task("snapshotter.take", [], arguments, queue=QUEUE)
    wait_for(lambda: worker.log.read_text().count("operation.misdirected") == 2)

    assert ended(world, ask(world, "own")).state == "succeeded"

    with transaction() as session:
        rows = [each for each in session.scalars(select(Operation)) if each.host == "kvm-2"]
    assert [(row.state, row.attempt, row.owner) for row in rows] == [("queued", 0, None)] * 2
    assert [line.split()[0] for line in worker.did()] == ["run"]
    assert redis_broker.queued("snapshots.kvm-2") >= 1  # a slow relay may send it twice


def test_raw_junk_in_the_queue(worker: Worker, world: World, redis_broker: Broker) -> None:
    """Celery ends a worker that reads what is no message at all: it still does the work it has
    begun, and the one that its supervisor then starts goes on with the rest."""
    under_way = ask(world, "before", "slow")
    wait_for(worker.did)
    redis_broker.client.lpush(f"triptych:{QUEUE}", b"junk")
    (worker.vault / "go").touch()
    worker.process.wait(90)
    worker.start()

    assert ended(world, ask(world, "after")).state == "succeeded"
    row = world.row(under_way)
    assert (row.state, row.attempt) == ("succeeded", 1)


@pytest.mark.timeout(300)
def test_three_workers_do_each_operation_once_and_in_order(
    redis_broker: Broker, world: World, any_database: str
) -> None:
    """Sixty operations of three services on ten servers: none is lost, none done twice, and on
    each server one after the other as they were accepted (E3, E4)."""
    servers = [world.server(f"web-{n}").id for n in range(10)]
    expected: dict[str, list[str]] = {server: [] for server in servers}
    with working(*(f"bench.faked_disks:{service}" for service in commands.SERVICES)):
        for n, server in enumerate(servers * 6):
            source = commands.CloneSource(kind="server", id=server)
            asked = (
                TakeSnapshot(server=server),
                commands.CreateImage(server=server),
                commands.CreateClones(source=source, name=f"clone-{n}"),
            )
            operation = world.submit(asked[n % len(asked)])
            outbox.flush()
            expected[server] += [f"began {server} {operation}", f"ended {server} {operation}"]
        wait_for(lambda: _all_ended(60), 150)

    done = (settings().vault / "executions").read_text().splitlines()
    assert expected == {server: [line for line in done if server in line] for server in servers}
    assert len(done) == 2 * 60


def _all_ended(count: int) -> bool:
    row: Any = Operation
    with reading() as session:
        ended = select(func.count()).select_from(Operation).where(row.state == "succeeded")
        return session.scalar(ended) == count


def test_channel_closes_with_a_message_that_cannot_be_given_back(
    redis_broker: Broker, world: World
) -> None:
    """As where Redis dies between a worker's taking a message and its saying so: the error of that
    ended the worker."""
    with publisher().connection() as connection:
        queue = connection.SimpleQueue("taken")
        queue.put({})
        queue.get(timeout=5)
        connection.transport.client = None  # given up already, by an earlier close

        queue.channel.close()

        assert queue.channel.closed
