"""Claiming, leases and taking over: an operation is one worker's at a time (E2, E3)."""

import threading
from datetime import datetime, timedelta
from typing import Any

import pytest
from operations.spine import HOST, World, at_once, nothing
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from shared import errors
from shared.commands import CreateImage
from shared.database import database_now, now, transaction
from shared.models import Host, Operation
from shared.models.hosts import SILENCE
from shared.operations import claim, presence, reconcile, runner
from shared.operations.finish import finish

pytestmark = pytest.mark.usefixtures("any_database")

DEAD = "kvm-1/snapshotter/of-a-process-that-is-gone"
ELSEWHERE = "kvm-9/snapshotter/of-another-host"


def test_one_of_many_claims_wins(world: World) -> None:
    """However many workers get the message, one has the operation."""
    operation = world.snapshot_of(world.server())

    got = at_once(*[lambda n=n: claim.claim(operation, f"kvm-1/s/{n}") for n in range(8)])  # type: ignore[misc]

    winners = [each for each in got if each]
    assert len(winners) == 1
    assert world.row(operation).owner == winners[0].owner


def test_claims_on_one_server_never_overlap(world: World) -> None:
    """Many claims of many operations of one server at once: the first in line, and it alone."""
    server = world.server()
    line = [world.snapshot_of(server) for _ in range(4)]

    got = at_once(*[lambda id_=id_: claim.claim(id_, f"kvm-1/s/{id_}") for id_ in line * 2])  # type: ignore[misc]

    assert [line[0]] == [each.id for each in got if each]


def test_servers_do_not_wait_for_each_other(world: World) -> None:
    """Operations on different servers run side by side."""
    one, two = (world.snapshot_of(world.server(name)) for name in ("one", "two"))
    assert claim.claim(one, "kvm-1/s/1")
    assert claim.claim(two, "kvm-1/s/2")


def test_index_refuses_a_second_running_operation(world: World) -> None:
    """Even a claim that forgot to look cannot make two operations run on one server."""
    server = world.server()
    first, second = world.snapshot_of(server), world.snapshot_of(server)
    world.change(first, state="running")
    with pytest.raises(IntegrityError):
        world.change(second, state="running")


def test_claim_that_the_index_refuses_is_no_claim(world: World) -> None:
    """A claim that was blind to another one, not yet committed, gets nothing and no error."""
    server = world.server()
    first, second = world.snapshot_of(server), world.snapshot_of(server)
    row: Any = Operation

    with transaction() as session:
        session.execute(update(Operation).where(row.id == second).values(state="running"))
        [got] = at_once_later(lambda: claim.claim(first, "kvm-1/s/1"), session)

    assert got() is None
    assert world.row(first).state == "queued"


def at_once_later(call: Any, session: Any) -> list[Any]:
    """Start the call in a thread and give it time to run into the open transaction."""
    import threading

    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(0.4)

    def result() -> Any:
        thread.join(30)
        return results[0]

    return [result]


def test_cancelled_operation_is_not_claimed(world: World) -> None:
    """A message that comes after the cancel finds nothing to do."""
    operation = world.snapshot_of(world.server())
    world.change(operation, state="cancelled")
    assert claim.claim(operation, "kvm-1/s/1") is None


def test_dead_worker_is_succeeded_at_once(world: World) -> None:
    """A worker of this host that is gone is known to be: its lease need not run out."""
    operation = world.snapshot_of(world.server())
    claim.claim(operation, DEAD)

    taken = claim.take_over(operation, "kvm-1/s/new")

    assert taken
    assert taken.owner == "kvm-1/s/new"


def test_many_successors_one_takes_over(world: World) -> None:
    """Of those who find the worker dead, one takes the operation over."""
    operation = world.snapshot_of(world.server())
    claim.claim(operation, DEAD)

    def successor() -> Operation | None:
        with presence.attempt("snapshotter") as owner:
            taken = claim.take_over(operation, owner)
            barrier.wait()
            return taken

    import threading

    barrier = threading.Barrier(4)
    got = at_once(*[successor] * 4)

    assert len([each for each in got if each]) == 1


def test_live_worker_with_a_late_heartbeat_keeps_its_operation(world: World) -> None:
    """A worker that lives but could not renew its lease is not pushed aside."""
    operation = world.snapshot_of(world.server())
    with presence.attempt("snapshotter") as owner:
        claim.claim(operation, owner)
        world.expire(operation)

        assert claim.take_over(operation, "kvm-1/s/new") is None

    assert claim.take_over(operation, "kvm-1/s/new")


def test_worker_that_hangs_is_given_up(world: World) -> None:
    """Alive but silent for several leases: then a server must not stay locked for ever."""
    operation = world.snapshot_of(world.server())
    with presence.attempt("snapshotter") as owner:
        claim.claim(operation, owner)
        world.expire(operation, seconds=2 * claim.STALLED + 1)

        assert claim.take_over(operation, "kvm-1/s/new")


def test_lease_counts_where_the_kernel_cannot_tell(world: World) -> None:
    """Of an owner on another host only the lease is known."""
    operation = world.snapshot_of(world.server())
    claim.claim(operation, ELSEWHERE)
    world.expire(operation, seconds=-60)
    assert claim.take_over(operation, "kvm-1/s/new") is None
    world.expire(operation)
    assert claim.take_over(operation, "kvm-1/s/new")


@pytest.mark.parametrize("state", ["queued", "succeeded", "failed", "cancelled"])
def test_only_what_runs_is_taken_over(world: World, state: str) -> None:
    """What has ended, or not begun, is nobody's to take over."""
    operation = world.snapshot_of(world.server())
    world.change(operation, state=state)
    world.expire(operation)
    assert claim.take_over(operation, "kvm-1/s/new") is None


def test_held_is_the_owners_alone(world: World) -> None:
    """The fence lets the owner through and nobody else."""
    operation = world.snapshot_of(world.server())
    claim.claim(operation, DEAD)
    with transaction() as session:
        assert operation == claim.held(session, operation, DEAD).id
    with pytest.raises(errors.LeaseLost), transaction() as session:
        claim.held(session, operation, "kvm-1/s/other")


def test_lease_is_counted_on_the_databases_clock(world: World) -> None:
    """Whatever a host's clock says, leases are compared on one."""
    operation = world.snapshot_of(world.server())
    before = now() - timedelta(milliseconds=100)
    with transaction() as session:
        told = database_now(session)
    claim.claim(operation, DEAD)
    after = now() + timedelta(milliseconds=100)

    lease = world.row(operation).lease_expires_at
    assert lease
    assert before < told < lease - timedelta(seconds=2) + timedelta(milliseconds=1) < after


def test_every_moment_is_aware(world: World) -> None:
    """What comes out of the database can be compared with what goes in."""
    operation = world.snapshot_of(world.server())
    world.handler(nothing)
    runner.run(operation)
    row = world.row(operation)
    moments = [row.created_at, row.woken_at, row.started_at, row.finished_at]
    assert [timedelta(0)] * 4 == [each and each.utcoffset() for each in moments]


def test_naive_moment_is_refused(world: World) -> None:
    """A datetime without a zone is a mistake, and is not stored."""
    operation = world.snapshot_of(world.server())
    with pytest.raises(Exception, match="naive"):
        world.change(operation, started_at=now().replace(tzinfo=None))


def test_reaper_wakes_what_nobody_works_on(world: World, redis_broker: Any) -> None:
    """An expired lease and a wake-up that was lost are found; work in progress is left alone."""
    abandoned, lost, waiting, busy = (
        world.snapshot_of(world.server(name)) for name in ("a", "b", "c", "d")
    )
    for operation in (abandoned, busy):
        claim.claim(operation, ELSEWHERE)
    world.expire(abandoned)
    world.expire(busy, seconds=-60)
    world.change(lost, woken_at=now() - timedelta(minutes=2))
    world.clear_outbox()

    assert reconcile.reconcile() == 2
    assert redis_broker.queued("snapshots.kvm-1") == 2
    assert world.row(waiting).state == "queued"


def test_reaper_wakes_nobody_on_a_silent_host(world: World, redis_broker: Any) -> None:
    """Its workers would have to read it all when they are back; once it reports, it is woken."""
    abandoned, lost = (world.snapshot_of(world.server(name)) for name in ("a", "b"))
    elsewhere = world.snapshot_of(world.server("c", host="kvm-2"))
    claim.claim(abandoned, ELSEWHERE)
    world.expire(abandoned)
    for operation in (lost, elsewhere):
        world.change(operation, woken_at=now() - timedelta(minutes=2))
    world.clear_outbox()

    def queued() -> list[int]:
        return [redis_broker.queued(f"snapshots.{host}") for host in (HOST, "kvm-2")]

    seen(now() - SILENCE - timedelta(seconds=5))
    assert (reconcile.reconcile(), queued()) == (1, [0, 1])
    seen(now())
    assert (reconcile.reconcile(), queued()) == (2, [2, 1])


def seen(moment: datetime) -> None:
    """The host last reported then."""
    with transaction() as session:
        session.get_one(Host, HOST).last_seen_at = moment


def test_reaper_does_not_wake_who_waits_in_line(world: World, redis_broker: Any) -> None:
    """Behind another operation of its server, waiting long is no sign of a lost message."""
    server = world.server()
    first, second = world.snapshot_of(server), world.snapshot_of(server)
    claim.claim(first, ELSEWHERE)
    world.expire(first, seconds=-60)
    world.change(second, woken_at=now() - timedelta(minutes=2))
    assert reconcile.reconcile() == 0


def test_worker_adopts_its_hosts_orphans(world: World) -> None:
    """At its start a worker wakes what dead ones of its service and host left behind."""
    orphan, other_service, elsewhere, alive = (world.server(n) for n in "abcd")
    ids = [world.snapshot_of(orphan)]
    ids.append(world.submit(CreateImage(server=other_service.id)))
    ids.append(world.snapshot_of(elsewhere))
    for operation in ids:
        claim.claim(operation, DEAD)
    world.change(ids[2], host="kvm-2")
    world.clear_outbox()

    with presence.attempt("snapshotter") as owner:
        claim.claim(world.snapshot_of(alive), owner)
        world.clear_outbox()
        assert reconcile.adopt_orphans("snapshotter") == 1

    assert ids[:1] == world.woken()


def test_line_is_first_come_first_served(world: World) -> None:
    """Ten operations of one server, claimed in any order, run in the order they came (E3)."""
    server = world.server()
    line = [world.snapshot_of(server) for _ in range(5)]
    ran: list[str] = []
    world.handler(lambda context, command: ran.append(context.id) or nothing(context, command))  # type: ignore[func-returns-value]

    while any(world.row(each).state == "queued" for each in line):
        for operation in reversed(line):
            runner.run(operation)

    assert line == ran
    with transaction() as session:
        states = set(session.scalars(select(Operation.state)))  # type: ignore[call-overload]
    assert {"succeeded"} == states


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_submitted_while_the_one_before_ends(world: World, any_database: str) -> None:
    """Whichever of the two transactions comes first: the new operation is woken, or can start
    when its own message comes. It must not be that the end did not see it, and its message,
    gone by before the end was committed, found the server taken."""
    world.handler(nothing)
    server = world.server()
    before = world.snapshot_of(server)
    assert claim.claim(before, DEAD)
    world.clear_outbox()
    new: list[str] = []

    def ask_and_deliver() -> None:
        new.append(world.snapshot_of(server))
        for woken in world.woken():
            world.clear_outbox()
            runner.run(woken)

    message = threading.Thread(target=ask_and_deliver)
    with transaction() as session:
        finish(session, claim.held(session, before, DEAD), "succeeded")
        message.start()
        message.join(1)
    message.join()

    assert world.row(new[0]).state == "succeeded" or world.woken() == new


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)
def test_start_is_told_after_the_wait_for_the_database(world: World, any_database: str) -> None:
    """A claim that waits for SQLite's one writer did not start when it began to wait: what a
    server did never seems to overlap (E3)."""
    server = world.server()
    before, after = world.snapshot_of(server), world.snapshot_of(server)
    assert claim.claim(before, DEAD)

    next_claim = threading.Thread(target=claim.claim, args=(after, DEAD))
    with transaction() as session:
        current = claim.held(session, before, DEAD)
        next_claim.start()
        next_claim.join(0.2)
        finish(session, current, "succeeded")
    next_claim.join()

    ended, started = world.row(before).finished_at, world.row(after).started_at
    assert ended and started and ended <= started
