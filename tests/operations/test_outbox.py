"""The way out: wake-ups to the queues and events to the stream, whatever the broker does."""

import json
import socket
import threading
import time
from typing import Any

import pytest
import redis
from operations.spine import Broker, World, nothing, wait_for
from sqlalchemy import select

from shared import events
from shared.database import transaction
from shared.events import STREAM, emit, relay
from shared.models import Event, OutboxMessage
from shared.operations import outbox, reconcile, runner

QUEUE = "snapshots.kvm-1"


def stream(broker: Broker) -> list[dict[str, Any]]:
    entries: Any = broker.client.xrange(STREAM)
    return [json.loads(fields[b"event"]) for _, fields in entries]


def emitted(*types: str) -> None:
    with transaction() as session:
        for each in types:
            emit(session, each, "srv_1", snapshot="snp_1")


def test_flush_sends_what_is_there_once(redis_broker: Broker, world: World) -> None:
    """Each wake-up goes to its queue, and out of the table."""
    for n in range(3):
        world.snapshot_of(world.server(f"s{n}"))
    assert outbox.flush() == 3
    assert (redis_broker.queued(QUEUE), world.woken()) == (3, [])
    assert outbox.flush() == 0


def test_outbox_waits_for_a_broker_that_is_away(redis_broker: Broker, world: World) -> None:
    """A request is accepted while Redis is down, and its wake-up goes out when it is back."""
    redis_broker.stop()
    try:
        operation = world.snapshot_of(world.server())
        assert not outbox.flush_if_possible()
        assert [operation] == world.woken()
    finally:
        redis_broker.start()
    assert outbox.flush_if_possible()
    assert (redis_broker.queued(QUEUE), world.woken()) == (1, [])


def test_operation_goes_on_without_a_broker(world: World) -> None:
    """Work under way needs no broker to end, and the next one's wake-up is kept."""
    server = world.server()
    first, second = world.snapshot_of(server), world.snapshot_of(server)
    world.clear_outbox()
    world.handler(nothing)
    runner.run(first)
    assert ("succeeded", [second]) == (world.row(first).state, world.woken())


def test_crash_between_send_and_delete_sends_again(
    redis_broker: Broker, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: the message is sent twice rather than not at all."""
    world.snapshot_of(world.server())

    def crash(**_: Any) -> Any:
        raise ConnectionError("the database went away")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "transaction", crash)
        assert not outbox.flush_if_possible()
    assert outbox.flush_if_possible()
    assert (redis_broker.queued(QUEUE), world.woken()) == (2, [])


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
def test_two_who_flush_at_once(
    redis_broker: Broker, world: World, any_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one is sending, the other leaves alone and does not wait for."""
    world.snapshot_of(world.server("one"))
    sending, go_on = threading.Event(), threading.Event()

    def slow_broker() -> redis.Redis:
        sending.set()
        go_on.wait(60)
        return redis_broker.client

    monkeypatch.setattr(outbox, "redis_client", slow_broker)
    first = threading.Thread(target=outbox.flush)
    first.start()
    sending.wait(60)
    assert outbox.flush() == 0
    go_on.set()
    world.snapshot_of(world.server("two"))
    assert outbox.flush() == 1
    first.join()
    assert (redis_broker.queued(QUEUE), world.woken()) == (2, [])


def test_broker_that_lost_its_memory(redis_broker: Broker, world: World) -> None:
    """Messages lost with the broker's data are sent anew by the reaper."""
    operation = world.snapshot_of(world.server())
    outbox.flush()
    redis_broker.client.flushall()
    world.change(
        operation, woken_at=world.row(operation).created_at - 2 * reconcile.WAKE_AGAIN_AFTER
    )
    reconcile.reconcile()
    assert redis_broker.queued(QUEUE) == 1


def _outbox_is_empty() -> bool:
    with transaction() as session:
        return session.scalars(select(OutboxMessage)).first() is None


def test_relay_sends_soon_after_a_kick(redis_broker: Broker, world: World) -> None:
    """The API's thread sends what a request left, also after the broker was away."""
    sender = outbox.Relay(retry=0.1, idle=60)
    sender.start()
    try:
        world.snapshot_of(world.server("one"))
        sender.kick()
        wait_for(lambda: redis_broker.queued(QUEUE) == 1)
        wait_for(_outbox_is_empty)  # else the same message rightly goes out once more
        redis_broker.stop()
        world.snapshot_of(world.server("two"))
        sender.kick()
        time.sleep(0.3)
        redis_broker.start()
        wait_for(lambda: redis_broker.queued(QUEUE) == 1)
    finally:
        sender.stop()
        sender.join(10)


# Events


def test_event_belongs_to_its_transaction(world: World, any_database: str) -> None:
    """What was rolled back did not happen, and is not told."""
    with pytest.raises(ZeroDivisionError), transaction() as session:
        emit(session, "snapshot.taken", "srv_1")
        raise ZeroDivisionError
    assert world.events("snapshot.taken") == []


def test_events_reach_the_stream_in_order(
    redis_broker: Broker, world: World, any_database: str
) -> None:
    """As CloudEvents 1.0, oldest first, each once while nothing breaks."""
    emitted("snapshot.taken", "snapshot.reverted", "snapshot.deleted")
    assert outbox.flush_if_possible()
    assert outbox.flush_if_possible()

    sent = stream(redis_broker)
    names = ["taken", "reverted", "deleted"]
    assert [f"triptych.snapshot.{name}" for name in names] == [each["type"] for each in sent]
    first = sent[0]
    assert first["time"].endswith("Z")
    known = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"}
    assert known == set(first)
    assert (first["specversion"], first["subject"]) == ("1.0", "srv_1")
    assert first["data"] == {"snapshot": "snp_1"}


def test_crash_between_append_and_commit_sends_again(
    redis_broker: Broker, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once, with the same id, by which a reader knows it."""
    emitted("snapshot.taken")

    def crash(**_: Any) -> Any:
        raise ConnectionError("the database went away")

    with monkeypatch.context() as patch:
        patch.setattr(events, "transaction", crash)
        with pytest.raises(ConnectionError):
            relay()
    assert relay() == 1
    assert relay() == 0
    sent = stream(redis_broker)
    assert (len(sent), len({each["id"] for each in sent})) == (2, 1)


def test_events_wait_for_a_broker_that_is_away(redis_broker: Broker, world: World) -> None:
    """None is lost while Redis is down."""
    redis_broker.stop()
    try:
        emitted("snapshot.taken")
        assert not outbox.flush_if_possible()
    finally:
        redis_broker.start()
    assert outbox.flush_if_possible()
    assert len(stream(redis_broker)) == 1
    with transaction() as session:
        assert session.scalars(select(Event)).one().relayed_at


def test_hung_broker_holds_up_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the relay waits for a broker that does not answer, the database can be written:
    else no heartbeat would come through."""
    emitted("snapshot.taken")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = redis.Redis(port=port, socket_timeout=15, retry=None)
        monkeypatch.setattr(events, "redis_client", lambda: client)
        failed: list[Exception] = []

        def try_relay() -> None:
            try:
                relay()
            except redis.RedisError as error:
                failed.append(error)

        thread = threading.Thread(target=try_relay)
        thread.start()
        held, _ = silent.accept()
        world.server()
        assert thread.is_alive(), "the relay was waiting all the time"
        held.close()
        thread.join(60)
    assert len(failed) == 1
