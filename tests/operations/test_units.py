"""Parts of an operation that are carried out side by side, and fail and are undone on their own."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from operations.spine import Killed, World, at_once, wait_for

from shared import errors, faults
from shared.database import transaction
from shared.operations import cancel, runner
from shared.operations.context import Context, Outcome
from shared.turns import Turns, side_by_side

PARTS = ("a", "b", "c")


class NoSpace(errors.TriptychError):
    """The disk is full"""

    code = "insufficient_space"


@pytest.fixture
def operation(world: World) -> str:
    return world.snapshot_of(world.server())


def farm(
    fail: str = "", then: BaseException | None = None, end: Exception | None = None
) -> runner.Handler:
    """Three units that each take two steps, beside the others; then one fails, or all of it."""
    all_of_them = threading.Barrier(len(PARTS))

    def part(context: Context, name: str) -> str:
        for step in (1, 2):
            all_of_them.wait(60)
            context.undo("note", step=f"{name}{step}")
        all_of_them.wait(60)
        if name == fail:
            raise then or NoSpace("Too little space.")
        return name.upper()

    def handle(context: Context, command: Any) -> Outcome:
        context.undo("note", step="whole")
        units = {name: partial(part, context, name) for name in PARTS}
        outcomes = context.side_by_side(units, len(PARTS))
        told = {name: getattr(outcome, "code", outcome) for name, outcome in outcomes.items()}
        if end:
            raise end
        return Outcome(told)

    return handle


def test_a_unit_is_undone_alone(world: World, any_database: str, operation: str) -> None:
    """One that fails takes back its own steps, backwards, whatever is written beside them."""
    world.handler(farm("b"))
    runner.run(operation)
    row = world.row(operation)
    assert (row.state, row.result) == ("succeeded", {"a": "A", "b": "insufficient_space", "c": "C"})
    assert world.played == ["b2", "b1"]
    assert world.journal(operation) == []


def test_an_operation_is_undone_with_its_units(
    world: World, any_database: str, operation: str
) -> None:
    """A worker that dies leaves all of them to the next one: each is undone backwards, and last
    what was done for all of them."""
    world.handler(farm("b", then=Killed()))
    with pytest.raises(Killed):
        runner.run(operation)
    assert world.played == []
    assert len(world.journal(operation)) == 1 + 2 * len(PARTS)

    world.handler(farm())
    runner.run(operation)

    assert world.row(operation).state == "succeeded"
    assert world.played[-1] == "whole"
    for name in PARTS:
        assert [each for each in world.played if each[0] == name] == [f"{name}2", f"{name}1"]


def test_units_are_undone_side_by_side(world: World, operation: str) -> None:
    """What one waits for in being undone does not hold up the others."""
    together = threading.Barrier(len(PARTS))

    def meet(step: str) -> None:
        if step != "whole":
            together.wait(60)

    world.action("note", meet)
    world.handler(farm(end=NoSpace("Too little space.")))
    runner.run(operation)
    assert world.row(operation).state == "failed"
    assert len(world.played) == 1 + 2 * len(PARTS)


def test_a_unit_that_cannot_be_undone_is_not_forgotten(world: World, operation: str) -> None:
    """Its error is told, the others go on, and its steps are undone, backwards, once more after
    the commit."""
    busy = ["once"]

    def sometimes(step: str) -> None:
        if step == "b2" and busy:
            busy.pop()
            raise OSError("busy")

    world.action("note", sometimes)
    world.handler(farm("b"))
    runner.run(operation)
    assert world.row(operation).result == {"a": "A", "b": "insufficient_space", "c": "C"}
    assert (world.played, world.row(operation).state) == (["b2", "b2", "b1"], "succeeded")


def test_a_cancel_stops_all_of_them(world: World, any_database: str, operation: str) -> None:
    """Those that copy, those that wait for their turn and those that have not begun."""
    begun: list[str] = []
    one = Turns(1)

    def part(context: Context, name: str) -> None:
        context.undo("note", step=name)
        begun.append(name)
        with one.one(context.check):
            wait_for(context.stopping)
            raise errors.Cancelled("The copy was stopped.")

    def handle(context: Context, command: Any) -> Outcome:
        context.side_by_side({name: partial(part, context, name) for name in PARTS}, 2)
        raise AssertionError("unreachable")

    world.handler(handle)
    thread = threading.Thread(target=runner.run, args=[operation])
    thread.start()
    wait_for(lambda: len(begun) == 2)
    asked = time.monotonic()
    with transaction() as session:
        cancel.cancel(session, operation)
    thread.join(90)

    assert time.monotonic() - asked < 5
    assert world.row(operation).state == "cancelled"
    assert sorted(world.played) == ["a", "b"]


def test_who_loses_the_lease_in_a_unit_undoes_nothing(world: World, operation: str) -> None:
    """Neither the unit that notices nor the others go on; all of it is the new owner's."""
    noticed: list[bool] = []
    begun = threading.Barrier(2)

    def part(context: Context, name: str) -> None:
        context.undo("note", step=name)
        begun.wait(60)
        if name == "a":
            world.change(operation, owner="kvm-1/snapshotter/another-worker")
            raise NoSpace("Too little space.")
        noticed.append(wait_for(context.stopping))
        raise errors.Cancelled("The copy was stopped.")

    def handle(context: Context, command: Any) -> Outcome:
        context.side_by_side({name: partial(part, context, name) for name in ("b", "a")}, 2)
        raise AssertionError("unreachable")

    world.handler(handle)
    runner.run(operation)
    row = world.row(operation)
    assert (row.state, row.owner, row.error) == (
        "running",
        "kvm-1/snapshotter/another-worker",
        None,
    )
    assert (noticed, world.played) == ([True], [])


def test_the_bytes_of_units_add_up(world: World, operation: str) -> None:
    """Progress is that of all of them, also of those that have not begun."""
    seen: list[tuple[int, int, int]] = []

    def part(context: Context, done: int) -> None:
        context.progress(done, 100)
        latest = context.latest()
        seen.append((latest["bytes_done"], latest["bytes_total"], latest["progress"]))

    def handle(context: Context, command: Any) -> Outcome:
        context.progress(10, 10)
        context.side_by_side({str(n): partial(part, context, n) for n in (100, 50, 0, 10)}, 1)
        return Outcome({})

    world.handler(handle)
    runner.run(operation)
    assert seen == [(100, 100, 25), (150, 200, 37), (150, 300, 37), (160, 400, 40)]


def test_many_units_write_at_once(world: World, any_database: str, operation: str) -> None:
    """A journal that sixteen threads write to, with one that reads, keeps every step."""
    names = [str(number) for number in range(64)]

    def part(context: Context, name: str) -> None:
        context.undo_all(*(("note", {"step": f"{name}-{step}"}) for step in range(3)))

    def handle(context: Context, command: Any) -> Outcome:
        began = time.monotonic()
        context.side_by_side({name: partial(part, context, name) for name in names}, 16)
        assert len(world.journal(operation)) == 3 * len(names)
        return Outcome({"seconds": time.monotonic() - began})

    world.handler(handle)
    runner.run(operation)
    row = world.row(operation)
    assert row.state == "succeeded", row.error
    assert row.result["seconds"] < 60


# Turns and threads


def test_turns_are_taken_in_order() -> None:
    """At most so many at a time, first come first served."""
    turns, begun, go = Turns(2), [], threading.Semaphore(0)

    def work(number: int) -> None:
        with turns.one(lambda: None):
            begun.append(number)
            assert go.acquire(timeout=60)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        if number < 2:
            wait_for(lambda number=number: len(begun) == number + 1)
        else:
            wait_for(lambda number=number: len(turns._line) == number - 1)
    assert begun == [0, 1]
    for number in (2, 3):
        go.release()
        wait_for(lambda number=number: len(begun) == number + 1)
    assert begun == [0, 1, 2, 3]
    for _ in threads:
        go.release()
    for thread in threads:
        thread.join(60)


def test_waiting_for_a_turn_ends_when_it_must() -> None:
    """What the check raises ends it, and leaves its place in the line to the next one."""
    turns = Turns(1)

    def refuse() -> None:
        raise errors.Cancelled("Cancelled.")

    with turns.one(lambda: None), pytest.raises(errors.Cancelled), turns.one(refuse):
        raise AssertionError("unreachable")
    with turns.one(refuse):
        pass


def test_threads_tell_whose_they_are() -> None:
    """Log lines of a thread carry what those of its caller do."""
    with structlog.contextvars.bound_contextvars(operation="op_1"):
        told = side_by_side([structlog.contextvars.get_contextvars] * 3, 2)
    assert told == [{"operation": "op_1"}] * 3


def test_a_fault_befalls_one_of_the_threads_that_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tests arm at a point happens once, however many pass it at once."""
    monkeypatch.setattr(faults, "_DIRECTORY", str(tmp_path))
    (tmp_path / "armed").write_text('[["here", "raise"], ["there", "kill"]]')

    def work() -> bool:
        try:
            faults.point("here")
        except faults.Injected:
            return True
        return False

    assert sum(at_once(*[work] * 16)) == 1
    assert (tmp_path / "armed").read_text() == '[["there", "kill"]]'
