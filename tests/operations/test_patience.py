"""The database goes away at the wrong moment: no work is thrown away, and none is done twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from operations.spine import World
from sqlalchemy.exc import OperationalError

from shared import errors, events
from shared.operations import context, patience, runner
from shared.operations.context import Context, Outcome
from shared.operations.runner import run


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY", 0.01)


def away(*_: Any, **__: Any) -> Any:
    raise OperationalError("SELECT 1", None, Exception("the database is away"))


def failing_once(real: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """`real`, whose first call does nothing; or does all, and its answer is lost."""
    calls: list[int] = []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            return real(*arguments, **named)
        if after:
            real(*arguments, **named)
        return away()

    return call


def telling(redo: bool) -> Callable[[Context, Any], Outcome]:
    """A handler whose outcome writes an event, and perhaps leaves something to do."""

    def handler(context: Context, command: Any) -> Outcome:
        context.undo("note", step="made")

        def apply(session: Any) -> Any:
            events.emit(session, "snapshot.taken", None, operation=context.id)
            return [("note", {"step": "finished"})] if redo else None

        return Outcome({"snapshot": context.id}, apply)

    return handler


@pytest.mark.parametrize("redo", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_commit_waits_for_the_database(
    world: World, any_database: str, monkeypatch: pytest.MonkeyPatch, redo: bool, after: bool
) -> None:
    """Whether the commit or only its answer was lost: it is done once, in the first attempt."""
    world.handler(telling(redo))
    operation = world.snapshot_of(world.server())
    monkeypatch.setattr(runner, "_commit", failing_once(runner._commit, after=after))

    run(operation)

    row = world.row(operation)
    assert (row.state, row.attempt, row.error) == ("succeeded", 1, None)
    assert [{"operation": operation}] == world.events("snapshot.taken")
    assert (["finished"] if redo else []) == world.played


def test_a_step_waits_for_its_entry_in_the_journal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is not taken before what undoes it is written down, however long that takes."""
    world.handler(telling(redo=False))
    operation = world.snapshot_of(world.server())
    monkeypatch.setattr(context, "held", failing_once(context.held, after=False))

    run(operation)

    assert world.row(operation).state == "succeeded"


def test_waiting_ends_when_the_work_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not own the operation any more commits nothing when the database is back."""

    def handler(context: Context, command: Any) -> Outcome:
        monkeypatch.setattr(runner, "_commit", lambda *_: (context._lost.set(), away()))
        return Outcome({})

    world.handler(handler)
    operation = world.snapshot_of(world.server())

    run(operation)

    assert world.row(operation).state == "running"


def test_waiting_ends_with_a_cancel() -> None:
    """A request to cancel is not held up by a disk that is full."""

    def check() -> None:
        raise errors.Cancelled("on request")

    with pytest.raises(errors.Cancelled):
        patience.patiently(check, away)


def test_work_that_lost_the_database_is_begun_again(world: World, any_database: str) -> None:
    """It is no failure of the operation: whoever takes it over undoes and begins again."""

    def handler(context: Context, command: Any) -> Outcome:
        if context.operation.attempt == 1:
            context.undo("note", step="begun")
            away()
        return Outcome({})

    world.handler(handler)
    operation = world.snapshot_of(world.server())
    run(operation)
    left = world.row(operation)
    assert (left.state, left.error) == ("running", None)

    run(operation)

    row = world.row(operation)
    assert (row.state, row.attempt) == ("succeeded", 2)
    assert world.played == ["begun"]
