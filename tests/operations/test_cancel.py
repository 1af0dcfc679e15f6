"""Cancelling at every moment: accepted and then true, or refused (E5)."""

import time
from functools import partial
from typing import Any

import pytest
from operations.spine import World, at_once, nothing
from sqlalchemy import select

from shared import errors
from shared.commands import CloneSource, CreateClones
from shared.database import transaction
from shared.models import Clone
from shared.operations import claim, runner
from shared.operations.cancel import cancel
from shared.operations.context import Context, Outcome


def ask(operation: str) -> str:
    """Ask for the end; the state that the row then has."""
    with transaction() as session:
        return cancel(session, operation).state


@pytest.fixture
def operation(world: World) -> str:
    return world.snapshot_of(world.server())


def test_cancel_while_queued(world: World, any_database: str) -> None:
    """It ends at once, is never begun, and the next one in line is woken."""
    server = world.server()
    first, second = world.snapshot_of(server), world.snapshot_of(server)
    world.handler(nothing)
    world.clear_outbox()

    assert ask(first) == "cancelled"
    assert [second] == world.woken()
    runner.run(first)
    row = world.row(first)
    assert row.error
    assert (row.state, row.attempt, row.error["code"]) == ("cancelled", 0, "cancelled")


def test_cancel_all_of_a_line_at_once(world: World, any_database: str) -> None:
    """Each is cancelled: none of them waits, to be woken, for one that waits for it."""
    server = world.server()
    operations = [world.snapshot_of(server) for _ in range(8)]
    assert at_once(*(partial(ask, each) for each in operations)) == ["cancelled"] * 8


def test_cancel_of_a_queued_farm_frees_its_names(world: World) -> None:
    """The clones that were planned are cancelled too, so the names can be asked for again."""
    source = CloneSource(kind="server", id=world.server().id)
    farm = CreateClones(source=source, name="qa-{n}", count=2)
    ask(world.submit(farm))
    with transaction() as session:
        assert {"cancelled"} == {each.state for each in session.scalars(select(Clone))}
    world.submit(farm)


def test_cancel_between_claim_and_start(
    world: World, any_database: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel that comes just after the claim is not forgotten by the attempt that begins."""
    real = claim.claim

    def claim_then_cancel(*arguments: str) -> Any:
        got = real(*arguments)
        ask(operation)
        return got

    began: list[bool] = []
    monkeypatch.setattr(claim, "claim", claim_then_cancel)
    world.handler(lambda context, command: began.append(True) or nothing(context, command))  # type: ignore[func-returns-value]
    runner.run(operation)
    assert world.row(operation).state == "cancelled"


def test_cancel_while_running(world: World, operation: str) -> None:
    """The work is told within a moment, and undone."""
    took: list[float] = []

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="copy")
        assert ask(operation) == "running"
        began = time.monotonic()
        while not context.stopping():
            assert time.monotonic() - began < 5
            time.sleep(0.02)
        took.append(time.monotonic() - began)
        context.phase("next")
        raise AssertionError("phase() did not stop the work")

    world.handler(handle)
    runner.run(operation)
    row = world.row(operation)
    assert row.error
    assert (row.state, row.error["code"]) == ("cancelled", "cancelled")
    assert world.played == ["copy"]
    assert took[0] < 5


def test_cancel_in_the_last_moment(world: World, any_database: str, operation: str) -> None:
    """Accepted before the commit means undone, also when no heartbeat came between."""

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="copy")
        context._stop.set()  # the heartbeat is late
        context._thread.join()
        ask(operation)
        return Outcome({"made": "it"})

    world.handler(handle)
    runner.run(operation)
    row = world.row(operation)
    assert (row.state, row.result, world.played) == ("cancelled", None, ["copy"])


def test_cancel_after_the_commit_is_refused(world: World, operation: str) -> None:
    """Past the point of no return it says so, and the rest is done."""
    refused: list[str] = []

    def during(step: str) -> None:
        with pytest.raises(errors.NotCancellable) as caught:
            ask(operation)
        refused.append(caught.value.detail)

    world.action("note", during)
    world.handler(lambda context, command: Outcome({}, lambda s: [("note", {"step": "rest"})]))
    runner.run(operation)
    assert len(refused) == 1
    assert world.row(operation).state == "succeeded"
    with pytest.raises(errors.NotCancellable):
        ask(operation)


def test_cancel_or_commit_never_both(world: World, any_database: str) -> None:
    """Asked for at the very moment of the commit, one of the two comes first."""

    def attempt(n: int) -> None:
        operation = world.snapshot_of(world.server(f"s{n}"))

        def asked() -> bool:
            time.sleep(0.002 * n)
            try:
                ask(operation)
            except errors.NotCancellable:
                return False
            return True

        accepted, _ = at_once(asked, lambda: runner.run(operation))
        if world.row(operation).state == "queued":
            runner.run(operation)
        wanted = "cancelled" if accepted else "succeeded"
        assert wanted == world.row(operation).state

    world.handler(nothing)
    for n in range(8):
        attempt(n)


def test_cancel_while_recovering(world: World, operation: str) -> None:
    """Nothing more is begun; what was begun is still undone first."""
    broken = [OSError("busy")]

    def sometimes(step: str) -> None:
        if broken:
            raise broken.pop()

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="copy")
        raise errors.Cancelled("Cancelled on request.")

    world.action("note", sometimes)
    world.handler(handle)
    runner.run(operation)
    assert ask(operation) == "running"
    world.expire(operation)
    runner.run(operation)
    assert (world.row(operation).state, world.played) == ("cancelled", ["copy", "copy"])


def test_cancel_twice_is_once(world: World, operation: str) -> None:
    """Asking again changes nothing and is no error."""
    assert [ask(operation), ask(operation)] == ["cancelled"] * 2
    assert len(world.events("operation.cancelled")) == 1


def test_cancel_of_nothing(world: World) -> None:
    """An unknown operation is not found."""
    with pytest.raises(errors.OperationNotFound):
        ask("op_nothing")
