"""Why an operation does not start or go on."""

from datetime import timedelta
from typing import Any

import pytest
from api_world import World
from fastapi.testclient import TestClient

from shared.database import now
from shared.models import Operation, Server


def waiting(api: TestClient, operation: Operation) -> str | None:
    """The reason, the same from each place that shows it."""
    found: str | None = api.get(f"/v1/operations/{operation.id}").json()["waiting"]
    listed = {each["id"]: each for each in api.get("/v1/operations").json()["items"]}
    assert found == listed[operation.id]["waiting"]
    return found


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "failed", "cancelled"])
def test_nothing_is_waited_for(api: TestClient, world: World, server: Server, state: str) -> None:
    """What has ended, and what starts or goes on by itself, has no reason to wait."""
    assert waiting(api, world.operation(server, state=state)) is None


@pytest.mark.parametrize(
    ("minutes", "words"), [(4, "4 min"), (119, "119 min"), (125, "2 h"), (3 * 24 * 60, "3 d")]
)
def test_waiting_for_a_silent_host(api: TestClient, world: World, minutes: int, words: str) -> None:
    """Queued work says for how long its host has been silent, and what it waits for."""
    world.host("kvm-2", last_seen_at=now() - timedelta(minutes=minutes))
    operation = world.operation(world.server(host="kvm-2"))
    assert waiting(api, operation) == (
        f"Host kvm-2 has not reported for {words}; this starts when its workers are back."
    )


def test_told_at_once(api: TestClient, world: World) -> None:
    """The very answer to the request says that its host is silent."""
    world.host("kvm-2", last_seen_at=None)
    world.server("elsewhere", host="kvm-2")
    asked = api.post("/v1/servers/elsewhere/images").json()
    assert asked["waiting"].startswith("Host kvm-2 has never reported;")


def test_waiting_in_line(api: TestClient, world: World, server: Server) -> None:
    """Who waits names the first in line, and how many come between."""
    queued_before = world.operation(server)
    first = world.operation(server, "snapshot.take", state="running")
    last = world.operation(server)
    world.operation(world.server("other"))

    assert waiting(api, first) is None
    assert f"Behind operation {first.id} (snapshot.take) on this server." == waiting(
        api, queued_before
    )
    assert waiting(api, last) == (
        f"Behind operation {first.id} (snapshot.take) on this server, and 1 more after it."
    )


def test_waiting_for_libvirt(api: TestClient, world: World) -> None:
    """What the host's row says of its trouble is passed on."""
    world.host("kvm-2", problem="libvirt does not answer: connection refused")
    operation = world.operation(world.server(host="kvm-2"))
    assert waiting(api, operation) == (
        "Host kvm-2 reports: libvirt does not answer: connection refused."
    )


@pytest.mark.parametrize(
    ("fields", "then"),
    [
        ({}, "they undo what was begun and try again."),
        ({"committed": True}, "they finish it."),
        ({"cancel_requested_at": now()}, "they undo what was begun, and it ends as cancelled."),
        ({"attempt": 3}, "they undo what was begun, and it ends as failed."),
        (
            {"error": {"code": "copy_failed", "message": "No."}},
            "they undo what was begun, and it ends as failed.",
        ),
    ],
)
def test_running_on_a_host_that_fell_silent(
    api: TestClient, world: World, fields: dict[str, Any], then: str
) -> None:
    """It says that its lease has run out, and what its host's workers will make of it."""
    world.host("kvm-2", last_seen_at=now() - timedelta(minutes=4))
    expired = now() - timedelta(minutes=4)
    running = {"state": "running", "attempt": 1, "lease_expires_at": expired, **fields}
    reason = waiting(api, world.operation(world.server(host="kvm-2"), **running))
    assert reason == (
        "Host kvm-2 has not reported for 4 min and the worker's lease has run out. When its "
        f"workers are back, {then}"
    )


def test_running_with_a_lease_that_holds(api: TestClient, world: World) -> None:
    """The host's report may be late where the work is not."""
    world.host("kvm-2", last_seen_at=now() - timedelta(minutes=4))
    held = now() + timedelta(seconds=15)
    server = world.server(host="kvm-2")
    assert waiting(api, world.operation(server, state="running", lease_expires_at=held)) is None


def test_reasons_cost_the_same_for_one_and_for_many(
    api: TestClient, world: World, statements: list[str]
) -> None:
    """A list of operations takes a few statements however many hosts and servers they are of."""
    counts = []
    for number in range(8):
        world.host(f"kvm-{number + 2}", last_seen_at=None)
        server = world.server(f"s{number}", host=f"kvm-{number + 2}")
        world.operation(server, state="running")
        world.operation(server)
        statements.clear()
        assert len(api.get("/v1/operations").json()["items"]) == 2 * (number + 1)
        counts.append(len(statements))
    assert [counts[0]] * 8 == counts
