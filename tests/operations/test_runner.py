"""Carrying an operation out, undoing it, and what becomes of it when its worker dies (E2)."""

import time
from datetime import timedelta
from typing import Any

import pytest
from operations.spine import Killed, Postgres, World, nothing, wait_for
from sqlalchemy.exc import OperationalError

from shared import errors
from shared.commands import CreateImage
from shared.database import now, transaction
from shared.events import emit
from shared.operations import claim, journal, presence, runner
from shared.operations.context import Context, Outcome
from shared.settings import settings

OTHER = "kvm-1/snapshotter/another-worker"


class NoSpace(errors.TriptychError):
    """The disk is full"""

    code = "insufficient_space"


@pytest.fixture
def operation(world: World) -> str:
    return world.snapshot_of(world.server())


def steps(*names: str, then: BaseException | None = None) -> runner.Handler:
    """A handler that writes these steps into its journal, and then ends, well or not."""

    def handle(context: Context, command: Any) -> Outcome:
        for name in names:
            context.undo("note", step=name)
        if then:
            raise then
        return Outcome({"made": "it"})

    return handle


def left_to_do(*names: str, during: Any = None) -> runner.Handler:
    """A handler whose commit leaves these steps to do."""

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="undo")
        return Outcome({}, lambda session: [("note", {"step": name}) for name in names])

    return handle


def die(world: World, operation: str) -> None:
    """Run the operation in a worker that does not survive it."""
    with pytest.raises(Killed):
        runner.run(operation)
    assert world.row(operation).state == "running"


# Well, or not


def test_success_is_committed_and_not_undone(
    world: World, any_database: str, operation: str
) -> None:
    """What a handler achieved stays; its journal is empty, its result on the row."""
    world.handler(steps("one", "two"))

    runner.run(operation)

    row = world.row(operation)
    assert (row.state, row.phase, row.progress) == ("succeeded", "succeeded", 100)
    assert (row.result, row.error, row.attempt) == ({"made": "it"}, None, 1)
    assert (world.played, world.journal(operation)) == ([], [])
    assert row.owner is row.lease_expires_at is None


def test_failure_is_undone_backwards(world: World, any_database: str, operation: str) -> None:
    """The last step is undone first, and the error says what happened."""
    world.handler(steps("one", "two", "three", then=NoSpace("Too little space.")))

    runner.run(operation)

    row = world.row(operation)
    assert world.played == ["three", "two", "one"]
    assert row.state == "failed"
    assert row.error == {"code": "insufficient_space", "message": "Too little space."}
    assert world.journal(operation) == []


def test_unexpected_error_fails_the_operation(world: World, operation: str) -> None:
    """A mistake in a handler is an internal error with its name, not a lost operation."""
    world.handler(steps("one", then=ZeroDivisionError("division by zero")))
    runner.run(operation)
    error = world.row(operation).error
    assert error
    assert error["code"] == "internal_error"
    assert "ZeroDivisionError" in error["message"]
    assert world.played == ["one"]


def test_command_that_no_longer_parses_fails(world: World, operation: str) -> None:
    """A row that another version wrote ends with an error instead of locking its server."""
    world.handler(nothing)
    world.change(operation, command={"server": "x", "from_the_future": True})
    runner.run(operation)
    assert world.row(operation).state == "failed"


def test_commit_is_one_transaction(world: World, any_database: str, operation: str) -> None:
    """When the last change fails, none is made, and the work is undone."""

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="copy")

        def apply(session: Any) -> None:
            emit(session, "snapshot.taken", None)
            session.flush()
            raise NoSpace("No.")

        return Outcome({"snapshot": "x"}, apply)

    world.handler(handle)
    runner.run(operation)

    assert (world.row(operation).state, world.row(operation).result) == ("failed", None)
    assert (world.events("snapshot.taken"), world.played) == ([], ["copy"])


def test_what_is_left_to_do_is_done_forwards(world: World, operation: str) -> None:
    """After the commit the rest is done in order, and only then is it a success."""
    world.handler(left_to_do("first", "second"))
    states: list[str] = []
    world.action("note", lambda step: states.append(world.row(operation).state))

    runner.run(operation)

    assert (world.played, states) == (["first", "second"], ["running"] * 2)
    assert world.row(operation).state == "succeeded"


def test_running_again_does_nothing(world: World, operation: str) -> None:
    """The message of an operation that has ended is dropped (E4)."""
    world.handler(steps("one"))
    runner.run(operation)
    finished = world.row(operation).finished_at
    runner.run(operation)
    row = world.row(operation)
    assert (1, finished) == (row.attempt, row.finished_at)
    assert len(world.events("operation.succeeded")) == 1


def test_progress_of_short_work_reaches_the_row(world: World, operation: str) -> None:
    """Bytes reported just before the end are on the row at the end."""

    def handle(context: Context, command: Any) -> Outcome:
        context.progress(1000, 1000)
        return Outcome({})

    world.handler(handle)
    runner.run(operation)
    row = world.row(operation)
    assert (row.bytes_done, row.bytes_total) == (1000, 1000)


def test_progress_is_seen_meanwhile(world: World, operation: str) -> None:
    """Phase, bytes and a renewed lease are on the row while the work goes on."""
    seen: list[Any] = []

    def handle(context: Context, command: Any) -> Outcome:
        first = world.row(operation).lease_expires_at
        context.phase("copying")
        context.progress(25, 100)
        wait_for(lambda: world.row(operation).progress == 25)
        row = world.row(operation)
        seen.extend([row.phase, row.bytes_done, row.bytes_total, row.lease_expires_at > first])  # type: ignore[operator]
        return Outcome({})

    world.handler(handle)
    runner.run(operation)
    assert seen == ["copying", 25, 100, True]


# The next in line


@pytest.mark.parametrize("end", [None, NoSpace("No.")])
def test_end_wakes_the_next_in_line(world: World, end: Exception | None) -> None:
    """Whether the first one succeeds or fails, the second gets its turn."""
    server = world.server()
    first, second, third = (world.snapshot_of(server) for _ in range(3))
    world.handler(steps(then=end))
    world.clear_outbox()

    runner.run(first)
    assert [second] == world.woken()

    world.handler(nothing)
    runner.run(second)
    assert [second, third] == world.woken()
    assert world.row(second).state == "succeeded"


def test_next_in_line_may_be_another_services(world: World) -> None:
    """The wake-up goes to the queue of the service that the next one is for."""
    server = world.server()
    first, second = world.snapshot_of(server), world.submit(CreateImage(server=server.id))
    world.handler(nothing)
    world.clear_outbox()
    runner.run(first)
    assert [second] == world.woken()


def test_misdirected_operation_is_left_alone(world: World) -> None:
    """On a queue of another service, or of another host, an operation is not touched."""
    world.handler(nothing)
    foreign = world.snapshot_of(world.server("foreign"))
    world.change(foreign, host="kvm-2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(runner._HANDLERS, "image.create", raising=False)
        image = world.submit(CreateImage(server=world.server("image").id))
        for operation in (foreign, image):
            runner.run(operation)
    assert [world.row(each).state for each in (foreign, image)] == ["queued"] * 2


# Errors while undoing


def test_error_inside_undo_keeps_the_server_locked(world: World, any_database: str) -> None:
    """What cannot be undone yet is tried again; until then nothing else runs on the server,
    and the error that began it is the one that the operation ends with."""
    server = world.server()
    operation, following = world.snapshot_of(server), world.snapshot_of(server)
    world.handler(steps("one", "two", then=NoSpace("Too little space.")))
    broken = [OSError("stale handle")]

    def sometimes(step: str) -> None:
        if step == "one" and broken:
            raise broken.pop()

    world.action("note", sometimes)

    runner.run(operation)

    row = world.row(operation)
    assert (row.state, row.phase, row.owner) == ("running", "recovering", None)
    assert world.journal(operation) == [("undo", "one")]
    assert claim.claim(following, OTHER) is None
    assert claim.take_over(operation, OTHER) is None, "it is not tried again at once"

    world.expire(operation)
    runner.run(operation)

    row = world.row(operation)
    assert row.error == {"code": "insufficient_space", "message": "Too little space."}
    assert (row.state, row.attempt) == ("failed", 1)
    assert world.played == ["two", "one", "one"]
    assert claim.claim(following, OTHER)


def test_undo_that_fails_again_and_again_keeps_the_first_error(
    world: World, operation: str
) -> None:
    """Whatever clearing up meets meanwhile, the verdict is the first one."""
    world.handler(steps("one", then=NoSpace("Too little space.")))

    def refuse(step: str) -> None:
        raise OSError("still busy")

    world.action("note", refuse)
    for _ in range(3):
        runner.run(operation)
        world.expire(operation)
    assert world.row(operation).phase == "recovering"
    world.action("note", lambda step: None)

    runner.run(operation)

    row = world.row(operation)
    assert row.error
    assert (row.state, row.error["code"]) == ("failed", "insufficient_space")


def test_worker_that_dies_in_undo_leaves_the_verdict(world: World, operation: str) -> None:
    """Who takes over finishes undoing and ends it with the error; it is not done again."""
    world.handler(steps("one", "two", then=NoSpace("Too little space.")))

    def kill(step: str) -> None:
        raise Killed

    world.action("note", kill)
    die(world, operation)
    world.action("note", lambda step: None)

    runner.run(operation)

    row = world.row(operation)
    assert row.error
    assert (row.state, row.error["code"], row.attempt) == ("failed", "insufficient_space", 1)
    assert world.played == ["two", "two", "one"]


def test_why_clearing_up_waits_is_told(world: World, operation: str) -> None:
    """Where a worker died, and what it left cannot be undone yet, the row says why."""
    world.handler(steps("one", then=Killed()))
    die(world, operation)

    def refuse(step: str) -> None:
        raise OSError("libvirt is away")

    world.action("note", refuse)
    runner.run(operation)
    row = world.row(operation)
    assert row.error
    assert (row.state, row.phase) == ("running", "recovering")
    assert "libvirt is away" in row.error["message"]

    world.action("note", lambda step: None)
    world.handler(nothing)
    world.expire(operation)
    runner.run(operation)
    row = world.row(operation)
    assert (row.state, row.error, row.attempt) == ("succeeded", None, 2)


# Workers that die


def test_worker_that_dies_is_succeeded(world: World, any_database: str, operation: str) -> None:
    """The next worker undoes what the dead one began, and does the work."""
    world.handler(steps("half", then=Killed()))
    die(world, operation)
    assert world.journal(operation) == [("undo", "half")]
    world.handler(steps("whole"))

    runner.run(operation)

    row = world.row(operation)
    assert (row.state, row.attempt) == ("succeeded", 2)
    assert world.played == ["half"]


def test_three_deaths_are_enough(world: World, operation: str) -> None:
    """An operation that kills its worker each time ends as worker_lost, all put back."""
    world.handler(steps("one", then=Killed()))
    for attempt in (1, 2, 3):
        die(world, operation)
        assert attempt == world.row(operation).attempt

    runner.run(operation)

    row = world.row(operation)
    assert row.error
    assert (row.state, row.error["code"], row.attempt) == ("failed", "worker_lost", 3)
    assert (world.played, world.journal(operation)) == (["one"] * 3, [])


def test_death_after_the_commit_is_completed(world: World, operation: str) -> None:
    """Past the point of no return nothing is undone; what was left is done."""
    world.handler(left_to_do("first", "second"))

    def kill(step: str) -> None:
        if step == "second":
            raise Killed

    world.action("note", kill)
    die(world, operation)
    world.action("note", lambda step: None)

    runner.run(operation)

    assert world.played == ["first", "second", "second"]
    assert (world.row(operation).state, world.row(operation).attempt) == ("succeeded", 1)


def test_error_after_the_commit_is_tried_again(world: World, operation: str) -> None:
    """What is left to do is done, sooner or later, and the operation is a success."""
    world.handler(left_to_do("first"))
    broken = [OSError("busy")]

    def sometimes(step: str) -> None:
        if broken:
            raise broken.pop()

    world.action("note", sometimes)
    runner.run(operation)
    row = world.row(operation)
    assert row.error
    assert (row.state, row.phase, row.committed) == ("running", "finishing", True)
    assert "busy" in row.error["message"]

    world.expire(operation)
    runner.run(operation)
    row = world.row(operation)
    assert (row.state, row.error) == ("succeeded", None)


def test_commit_whose_answer_is_lost_is_still_a_commit(
    world: World, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may commit and the connection break before it says so."""
    from contextlib import contextmanager

    world.handler(left_to_do("rest"))
    real = runner.transaction
    pending = ["break"]

    @contextmanager
    def breaking() -> Any:
        with real() as session:
            yield session
        if pending and world.row(operation).committed:
            pending.pop()
            raise OperationalError("COMMIT", None, Exception("server closed the connection"))

    monkeypatch.setattr(runner, "transaction", breaking)
    runner.run(operation)

    assert pending == []
    assert (world.played, world.row(operation).state) == (["rest"], "succeeded")


def test_cancel_of_an_orphan_ends_it(world: World, operation: str) -> None:
    """Cancelled after its worker died: it is undone and not begun again."""
    world.handler(steps("one", then=Killed()))
    die(world, operation)
    world.change(operation, cancel_requested_at=now())
    runner.run(operation)
    assert (world.row(operation).state, world.played) == ("cancelled", ["one"])


# Workers that are taken for dead


def stolen(world: World, operation: str) -> None:
    world.change(operation, owner=OTHER, lease_expires_at=now() + timedelta(minutes=1))


def still_the_others(world: World, operation: str) -> None:
    row = world.row(operation)
    assert (row.state, row.owner, row.error) == ("running", OTHER, None)
    assert world.events("operation.failed") + world.events("operation.succeeded") == []


@pytest.mark.parametrize("end", [None, NoSpace("Too little space."), errors.Cancelled("No.")])
def test_who_lost_the_lease_undoes_and_commits_nothing(
    world: World, any_database: str, operation: str, end: Exception | None
) -> None:
    """However its work ends, it leaves the operation to the worker that has it now."""

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="mine")
        stolen(world, operation)
        if end:
            raise end
        return Outcome({"mine": True}, lambda session: emit(session, "snapshot.taken", None))  # type: ignore[func-returns-value]

    world.handler(handle)
    runner.run(operation)

    still_the_others(world, operation)
    assert (world.played, world.events("snapshot.taken")) == ([], [])
    assert world.journal(operation) == [("undo", "mine")]


def test_who_lost_the_lease_takes_no_further_step(
    world: World, any_database: str, operation: str
) -> None:
    """The journal refuses its next step, before the step is taken."""

    def handle(context: Context, command: Any) -> Outcome:
        stolen(world, operation)
        context.undo("note", step="mine")
        raise AssertionError("the step was taken")

    world.handler(handle)
    runner.run(operation)
    still_the_others(world, operation)
    assert world.journal(operation) == []


def test_lease_lost_in_the_middle_of_undo(world: World, operation: str) -> None:
    """The one action under way ends; the others are the new owner's."""
    world.handler(steps("one", "two", then=NoSpace("Too little space.")))
    world.action("note", lambda step: stolen(world, operation))
    runner.run(operation)
    assert world.played == ["two"]
    row = world.row(operation)
    assert (row.state, row.owner) == ("running", OTHER)
    assert world.journal(operation) == [("undo", "one")]


def test_lease_lost_while_finishing(world: World, operation: str) -> None:
    """The new owner finishes; the end is told once."""
    world.handler(left_to_do("rest"))
    world.action("note", lambda step: stolen(world, operation))
    runner.run(operation)
    still_the_others(world, operation)


def test_heartbeat_notices_the_loss(world: World, operation: str) -> None:
    """A long copy is told to stop soon after another worker took over."""
    noticed: list[bool] = []

    def handle(context: Context, command: Any) -> Outcome:
        stolen(world, operation)
        noticed.append(wait_for(context.stopping))
        raise errors.Cancelled("The copy was stopped.")

    world.handler(handle)
    runner.run(operation)
    assert noticed == [True]
    still_the_others(world, operation)


def test_lease_stays_renewed_on_take_over(world: World, operation: str) -> None:
    """Clearing up that takes longer than a lease does not give the operation away: the attempt
    that follows begins with the lease as it is, not as it was."""
    world.handler(steps("one", then=Killed()))
    die(world, operation)
    leases: list[Any] = []

    def lease() -> Any:
        return world.row(operation).lease_expires_at

    def clear_up(step: str) -> None:
        leases.append(lease())
        leases.append(wait_for(lambda: lease() > leases[0] and lease()))

    def handle(context: Context, command: Any) -> Outcome:
        leases.append(lease())
        return Outcome({})

    world.action("note", clear_up)
    world.handler(handle)
    runner.run(operation)
    taken, renewed, begun_with = leases
    assert taken < renewed <= begun_with


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_database_that_is_away_costs_no_work(
    world: World,
    any_database: str,
    operation: str,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy outlives a crash of the database that lasts longer than its lease."""
    monkeypatch.setattr(settings(), "lease", 6.0)
    # So many of them are time for it to come back in.
    monkeypatch.setattr("shared.operations.context.STALLED", 20)

    def handle(context: Context, command: Any) -> Outcome:
        postgres.stop()
        time.sleep(6.5)
        postgres.start()
        assert claim.take_over(operation, OTHER) is None
        lease = world.row(operation).lease_expires_at
        wait_for(lambda: world.row(operation).lease_expires_at != lease)
        context.check()
        return Outcome({})

    world.handler(handle)
    runner.run(operation)
    assert (world.row(operation).state, world.row(operation).attempt) == ("succeeded", 1)


def test_database_that_stays_away_ends_the_work(
    world: World, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody else may take it over, a worker that is cut off stops by itself."""

    def away(context: Context) -> bool:
        raise OperationalError("UPDATE", None, Exception("no route to host"))

    monkeypatch.setattr(Context, "_renew", away)
    monkeypatch.setattr("shared.operations.context.STALLED", 0.5)

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="mine")
        wait_for(context.stopping)
        raise errors.Cancelled("The copy was stopped.")

    world.handler(handle)
    runner.run(operation)
    row = world.row(operation)
    assert (row.state, row.error, world.played) == ("running", None, [])
    assert presence.of(row.owner or "") == "dead", "a successor need not wait"


# Presence


def test_presence_leaves_no_files(world: World, operation: str) -> None:
    """An attempt that ended takes its lock file away, and so does who finds a dead one's."""
    world.handler(nothing)
    runner.run(operation)
    folder = settings().vault / ".workers"
    assert list(folder.iterdir()) == []

    (folder / "kvm-1~snapshotter~killed").touch()
    assert presence.of("kvm-1/snapshotter/killed") == "dead"
    assert list(folder.iterdir()) == []


def test_presence_of_others(world: World) -> None:
    """Alive while it lasts, dead when it is over, unknown on other hosts."""
    with presence.attempt("snapshotter") as owner:
        assert presence.of(owner) == "alive"
    assert presence.of(owner) == "dead"
    assert presence.of("kvm-9/snapshotter/x") == "unknown"


def test_journal_takes_registered_actions_only(world: World, operation: str) -> None:
    """A step that nobody could undo is not written, so not taken."""
    with pytest.raises(KeyError, match="no journal action"), transaction() as session:
        journal.write(session, operation, "undo", "no_such_action")
