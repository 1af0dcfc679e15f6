"""From a command to an operation, by the API's call or by a message (E4)."""

import threading
from typing import Any

import pytest
from operations.spine import World, at_once, nothing
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from shared import entry, errors
from shared.commands import CloneSource, CreateClones, DeleteSnapshot, TakeSnapshot
from shared.database import transaction
from shared.models import Operation, OutboxMessage
from shared.operations.submit import submit


def operations() -> int:
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(Operation)) or 0


def test_row_and_wake_up_are_one(world: World, any_database: str) -> None:
    """A request that is rolled back leaves neither an operation nor a message."""
    server = world.server()
    with pytest.raises(ZeroDivisionError), transaction() as session:
        submit(session, TakeSnapshot(server=server.id), requested_by="test")
        raise ZeroDivisionError
    assert (operations(), world.woken()) == (0, [])


def test_same_key_same_operation(world: World) -> None:
    """The same key with the same command gives the operation it gave before."""
    command = TakeSnapshot(server=world.server().name)
    assert world.submit(command, "key") == world.submit(command, "key")
    assert operations() == 1


def test_same_key_gives_the_operation_also_when_it_has_ended(world: World) -> None:
    """What has become of the server meanwhile does not matter."""
    command = TakeSnapshot(server=world.server().name)
    first = world.submit(command, "key")
    world.change(first, state="failed")
    assert first == world.submit(command, "key")


def test_same_key_another_command(world: World) -> None:
    """A key belongs to one request."""
    server = world.server()
    world.submit(TakeSnapshot(server=server.id), "key")
    with pytest.raises(errors.IdempotencyKeyReused):
        world.submit(TakeSnapshot(server=server.id, replace=True), "key")


def test_two_requests_at_once_with_one_key(world: World, any_database: str) -> None:
    """The second one finds the first one's operation, though it began before it was there."""
    command = TakeSnapshot(server=world.server().id)
    second: list[str] = []
    thread = threading.Thread(target=lambda: second.append(world.submit(command, "key")))
    with transaction() as session:
        first = submit(session, command, requested_by="test", idempotency_key="key").id
        thread.start()
        thread.join(0.4)
        assert second == [], "it must wait for the first one's end"
    thread.join(30)

    assert [first] == second
    assert (1, [first]) == (operations(), world.woken())


def test_two_farms_at_once_with_one_name(world: World, any_database: str) -> None:
    """One gets the names, the other is told so."""
    source = CloneSource(kind="server", id=world.server().id)
    farm = CreateClones(source=source, name="qa-{n}", count=3)

    def ask() -> str:
        try:
            return world.submit(farm)
        except errors.CloneNameTaken as error:
            return error.code

    got = at_once(*[ask] * 4)
    assert got.count("clone_name_taken") == 3
    assert operations() == 1


def test_delete_means_the_snapshot_there_is(world: World) -> None:
    """Without a snapshot there is nothing to delete, and no operation."""
    with pytest.raises(errors.SnapshotNotFound):
        world.submit(DeleteSnapshot(server=world.server().id))
    assert operations() == 0


# Messages


class Task:
    """What Celery hands to a task."""

    class Again(Exception):
        pass

    def __init__(self, id_: str = "msg-1") -> None:
        self.request = type("Request", (), {"id": id_})
        self.retries: list[dict[str, Any]] = []

    def retry(self, **options: Any) -> Exception:
        self.retries.append(options)
        return self.Again()


def receive(task: Task, operation_id: Any = None, **fields: Any) -> None:
    entry.receive(task, TakeSnapshot, operation_id, fields)


def test_command_becomes_an_operation(world: World) -> None:
    """A full command from anyone is done, and its row says where it came from."""
    world.handler(nothing)
    receive(Task(), server=world.server().name)
    with transaction() as session:
        row = session.scalars(select(Operation)).one()
    assert (row.state, row.requested_by) == ("succeeded", "queue")


def test_command_delivered_twice_is_done_once(world: World, any_database: str) -> None:
    """Also when both deliveries are read at the same time."""
    server = world.server()
    done: list[str] = []
    world.handler(lambda context, command: done.append(context.id) or nothing(context, command))  # type: ignore[func-returns-value]
    at_once(*[lambda: receive(Task(), server=server.name)] * 4)
    receive(Task(), server=server.name)
    assert (operations(), len(done)) == (1, 1)


@pytest.mark.parametrize(
    "message",
    [
        {"operation_id": "op_unknown"},
        {"operation_id": ["not", "a", "string"]},
        {"operation_id": {"seq": 1}},
        {"operation_id": 7},
        {"server": "no-such-server"},
        {"server": "web", "colour": "blue"},
        {"server": 5},
        {},
    ],
)
def test_message_that_makes_no_sense_is_dropped(world: World, message: dict[str, Any]) -> None:
    """It is logged, ends, and touches nothing."""
    world.server()
    world.handler(nothing)
    receive(Task(), **message)
    assert operations() == 0


def test_command_outlives_the_databases_absence(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the message remembers a direct command: it is asked to come again."""

    def away() -> Any:
        raise OperationalError("BEGIN", None, Exception("connection refused"))

    server = world.server()
    task = Task()
    with monkeypatch.context() as patch:
        patch.setattr(entry, "transaction", away)
        with pytest.raises(Task.Again):
            receive(task, server=server.name)
    assert [each["max_retries"] for each in task.retries] == [None]


def test_outbox_is_empty_of_what_was_refused(world: World) -> None:
    """A refused request leaves no wake-up behind."""
    with pytest.raises(errors.ServerNotFound):
        world.submit(TakeSnapshot(server="nothing"))
    with transaction() as session:
        assert list(session.scalars(select(OutboxMessage))) == []
