"""`GET /metrics`: what it says of a world that is known, on both databases."""

import re
from datetime import timedelta
from typing import Any

import pytest
from api_world import World
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from shared import VERSION
from shared.database import engine, now, transaction
from shared.models import Event, Operation, OutboxMessage, Schedule, ScheduleRun, Server
from shared.operations.finish import finish

Samples = dict[frozenset[tuple[str, str]], float]
DAY = 86400


@pytest.fixture(autouse=True)
def _each_database(any_database: str) -> None:
    """Every test here runs on both."""


def scrape(api: TestClient) -> dict[str, Samples]:
    """The samples by name and labels; each must be there once."""
    response = api.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in series, sample
            series[labels] = sample.value
    return found


def value(found: dict[str, Samples], name: str, **labels: str) -> float | None:
    """Of the one series that has these labels and perhaps more; None where there is none."""
    matching = [
        each
        for series, each in found.get(f"triptych_{name}", {}).items()
        if labels.items() <= dict(series).items()
    ]
    assert len(matching) < 2, matching
    return matching[0] if matching else None


def age(found: dict[str, Samples], name: str, **labels: str) -> float | None:
    """Seconds since a timestamp, to the next minute."""
    then = value(found, f"{name}_timestamp_seconds", **labels)
    return None if then is None else round((now().timestamp() - then) / 60) * 60


def ended(world: World, server: Server, state: str, seconds: float = 3, **fields: Any) -> Operation:
    work = world.operation(server, started_at=now() - timedelta(seconds=seconds), **fields)
    with transaction() as session:
        finish(session, session.merge(work), state)
    return work


def schedule(world: World, server: Server, kind: str = "daily", **fields: Any) -> Schedule:
    given = {"at": "03:00", "timezone": "UTC", "keep": 7, "catch_up_s": 3600, **fields}
    return world.add(Schedule(server_id=server.id, kind=kind, **given))


def test_of_an_empty_database(api: TestClient) -> None:
    """Nothing is there, and that is said: the version and two empty backlogs."""
    found = scrape(api)
    assert value(found, "build_info", version=VERSION) == 1
    assert value(found, "outbox_messages") == value(found, "events_unrelayed") == 0
    assert set(found) == {
        "triptych_build_info",
        "triptych_outbox_messages",
        "triptych_events_unrelayed",
    }


def test_ended_operations(api: TestClient, world: World, server: Server) -> None:
    """Counted by state; kinds and states of which none has ended yet are 0, not absent."""
    for state in ("succeeded", "succeeded", "failed"):
        ended(world, server, state)
    found = scrape(api)
    of = {"host": "kvm-1", "service": "imager", "kind": "image.create"}
    assert value(found, "operations_total", state="succeeded", **of) == 2
    assert value(found, "operations_total", state="failed", **of) == 1
    assert value(found, "operations_total", state="cancelled", **of) == 0
    assert value(found, "operations_total", kind="clone.create", state="failed") == 0


def test_durations(api: TestClient, world: World, server: Server) -> None:
    """A histogram in seconds, cumulative."""
    for seconds in (61, 61, 601, 90_000):  # this machine's own time comes to it
        ended(world, server, "succeeded", seconds)
    found = scrape(api)
    name, of = "operation_duration_seconds", {"kind": "image.create", "state": "succeeded"}
    buckets = {
        le: value(found, f"{name}_bucket", le=le, **of) for le in ("60.0", "300.0", "1800.0")
    }
    assert buckets == {"60.0": 0, "300.0": 2, "1800.0": 3}
    assert value(found, f"{name}_bucket", le="+Inf", **of) == 4
    assert value(found, f"{name}_count", **of) == 4
    assert value(found, f"{name}_sum", **of) == pytest.approx(90_723, abs=200)


def test_pauses_and_bytes(api: TestClient, world: World, server: Server) -> None:
    """Seconds that guests stood still, and bytes by the way they were copied."""
    ended(world, server, "succeeded", bytes_done=100, result={"way": "reflink", "pause_ms": 9.5})
    ended(world, server, "succeeded", bytes_done=50, result={"way": "stream", "pause_ms": 0.0})
    ended(world, server, "succeeded", kind="image.delete", result={"image": "img_1"})
    found = scrape(api)
    assert value(found, "guest_pause_seconds_count") == 1
    assert value(found, "guest_pause_seconds_sum") == pytest.approx(0.0095)
    assert value(found, "guest_pause_seconds_bucket", le="0.005") == 0
    assert value(found, "guest_pause_seconds_bucket", le="0.01") == 1
    assert value(found, "copied_bytes_total", way="reflink") == 100
    assert value(found, "copied_bytes_total", way="stream") == 50


def test_queue(api: TestClient, world: World, server: Server) -> None:
    """How many wait and run, by host and service, 0 included; and since when the oldest waits."""
    world.operation(server, state="running")
    world.operation(server, created_at=now() - timedelta(seconds=300))
    world.operation(server, created_at=now() - timedelta(seconds=900))
    world.operation(server, kind="clone.create", service="cloner")
    found = scrape(api)
    of = {"host": "kvm-1", "service": "imager"}
    assert value(found, "operations_queued", **of) == 2
    assert value(found, "operations_running", **of) == 1
    assert age(found, "operations_queued_oldest", **of) == 900
    assert value(found, "operations_queued", service="cloner") == 1
    assert value(found, "operations_queued", service="snapshotter") == 0
    assert age(found, "operations_queued_oldest", service="snapshotter") is None


def test_backlogs(api: TestClient, world: World, server: Server) -> None:
    """What the broker and the stream have not got yet, and since when."""
    with transaction() as session:
        session.execute(text("DELETE FROM event"))
    for seconds in (60, 600):
        world.add(OutboxMessage(task="t", queue="q", created_at=now() - timedelta(seconds=seconds)))
    world.add(Event(type="triptych.a", time=now() - timedelta(seconds=900), relayed_at=now()))
    world.add(Event(type="triptych.b", time=now() - timedelta(seconds=120)))
    found = scrape(api)
    assert value(found, "outbox_messages") == 2
    assert age(found, "outbox_messages_oldest") == 600
    assert value(found, "events_unrelayed") == 1
    assert age(found, "events_unrelayed_oldest") == 120


def test_newest_image(api: TestClient, world: World, server: Server) -> None:
    """The newest whole one, and the newest whose verification passed; what is damaged, deleted
    or another server's does not count."""

    def image(name: str, days: float, **fields: Any) -> None:
        world.image(server, name, created_at=now() - timedelta(days=days), **fields)

    image("damaged", 0.5, state="damaged", verified_result="damaged")
    image("deleted", 0.5, deleted_at=now())
    image("newest", 1)
    image("verified", 2, verified_result="passed")
    image("oldest", 3, verified_result="passed")
    bare = world.server("bare", domain_uuid="x")
    found = scrape(api)
    of = {"host": "kvm-1", "server": "web-1", "server_id": server.id}
    assert age(found, "server_newest_image", **of) == DAY
    assert age(found, "server_newest_verified_image", **of) == 2 * DAY
    assert value(found, "server_images", **of) == 3
    assert value(found, "server_info", **of) == 1
    assert value(found, "server_images", server_id=bare.id) == 0
    assert age(found, "server_newest_image", server_id=bare.id) is None


def test_forgotten_servers_are_not_watched(api: TestClient, world: World, server: Server) -> None:
    """Their images stay, but nobody is woken for their age."""
    world.image(world.server("gone", domain_uuid="x", forgotten_at=now()))
    found = scrape(api)
    assert [dict(each)["server"] for each in found["triptych_server_info"]] == ["web-1"]
    assert "triptych_server_newest_image_timestamp_seconds" not in found


def test_servers_of_one_name(api: TestClient, world: World, server: Server) -> None:
    """Each has its own series, by its id."""
    twin = world.server("web-1", domain_uuid="twin")
    found = scrape(api)
    assert value(found, "server_info", server_id=server.id) == 1
    assert value(found, "server_info", server_id=twin.id) == 1


def test_snapshot(api: TestClient, world: World, server: Server) -> None:
    """When it was taken and when it goes; of one that is gone there is nothing."""
    taken = now() - timedelta(hours=1)
    world.snapshot(server, taken_at=taken - timedelta(days=9), deleted_at=now())
    world.snapshot(server, taken_at=taken, expires_at=taken + timedelta(hours=48))
    found = scrape(api)
    assert age(found, "snapshot_taken", server="web-1") == 3600
    assert age(found, "snapshot_expires", server="web-1") == -47 * 3600


def test_schedule(api: TestClient, world: World, server: Server) -> None:
    """Its period and next slot, its failures, and how late its last run began."""
    daily = schedule(
        world, server, start_at=now() + timedelta(hours=2), failures_in_row=3, created_at=now()
    )
    slot = now() - timedelta(days=1)
    for back, late in ((1, 400), (0, 40)):
        nominal = slot - timedelta(days=back)
        work = world.operation(
            server, state="succeeded", started_at=nominal + timedelta(seconds=late)
        )
        given = {"schedule_id": daily.id, "state": "succeeded", "operation_id": work.id}
        start = nominal + timedelta(seconds=10)
        world.add(ScheduleRun(slot=nominal, start_at=start, **given))
    found = scrape(api)
    of = {"host": "kvm-1", "server": "web-1", "server_id": server.id, "schedule": "daily"}
    assert value(found, "schedule_period_seconds", **of) == DAY
    assert age(found, "schedule_created", **of) == 0
    assert age(found, "schedule_next_run", **of) == -2 * 3600
    assert value(found, "schedule_failures_in_row", **of) == 3
    assert value(found, "schedule_lateness_seconds", **of) == pytest.approx(30)


def test_late_run_that_waits(api: TestClient, world: World, server: Server) -> None:
    """While its operation is queued, a run gets later; one that never began is not late."""
    waiting = schedule(world, server, start_at=now())
    never = schedule(world, server, "weekly", start_at=now(), weekday="sun")
    slot = now() - timedelta(seconds=500)
    for each, state in ((waiting, "queued"), (never, "cancelled")):
        work = world.operation(server, state=state)
        given = {"schedule_id": each.id, "state": "running", "operation_id": work.id}
        world.add(ScheduleRun(slot=slot, **given))
    found = scrape(api)
    late = value(found, "schedule_lateness_seconds", schedule="daily")
    assert late == pytest.approx(500, abs=20)
    assert value(found, "schedule_lateness_seconds", schedule="weekly") is None


def test_disabled_schedule(api: TestClient, world: World, server: Server) -> None:
    """It has no period and no next slot, so that nothing is expected of it."""
    schedule(world, server, enabled=False)
    found = scrape(api)
    assert value(found, "schedule_failures_in_row", schedule="daily") == 0
    assert value(found, "schedule_period_seconds") is None
    assert age(found, "schedule_next_run") is None


def test_hosts(api: TestClient, world: World) -> None:
    """Up is what `GET /v1/hosts` calls answering; a host that has not said its room has none."""
    world.host("kvm-2", facts={"free_bytes": 5, "total_bytes": 50})
    world.host("silent", last_seen_at=now() - timedelta(seconds=120), facts={})
    world.host("broken", problem="libvirt does not answer")
    found = scrape(api)
    up = {name: value(found, "host_up", host=name) for name in ("kvm-2", "silent", "broken")}
    assert up == {"kvm-2": 1, "silent": 0, "broken": 0}
    assert age(found, "host_last_seen", host="silent") == 120
    assert value(found, "vault_free_bytes", host="kvm-2") == 5
    assert value(found, "vault_size_bytes", host="kvm-2") == 50
    assert value(found, "vault_free_bytes", host="silent") is None


def test_vaults(api: TestClient, world: World, server: Server) -> None:
    """What copies take up, as it was measured last; a vault without copies says 0."""
    world.host("empty")
    world.image(server, bytes=100, unique_bytes=30, measured_at=now())
    world.snapshot(server, bytes=50)
    found = scrape(api)

    def values(host: str) -> list[float | None]:
        names = ("copies", "apparent_bytes", "unique_bytes", "shared_bytes")
        return [value(found, f"vault_{name}", host=host) for name in names]

    assert values("kvm-1") == [2, 150, 30, 70]
    assert values("empty") == [0, 0, 0, 0]


def test_as_many_queries_however_much_there_is(
    api: TestClient, world: World, server: Server, statements: list[str]
) -> None:
    """Ten servers and hosts cost what one does."""
    scrape(api)
    before = len(statements)
    for n in range(10):
        world.host(f"host-{n}")
        made = world.server(f"server-{n}", domain_uuid=str(n))
        world.image(made)
        world.snapshot(made)
        schedule(world, made, start_at=now())
        ended(world, made, "succeeded", result={"way": "stream", "pause_ms": 1})
    statements.clear()
    scrape(api)
    assert len(statements) == before < 14


def test_does_not_walk_through_history(
    api: TestClient, world: World, server: Server, statements: list[str], any_database: str
) -> None:
    """On SQLite, which says it: operations, runs and events are found by index. (PostgreSQL has
    the same indexes, and uses them where a table is worth it.)"""
    if any_database != "sqlite":
        return
    scrape(api)
    with engine().connect() as connection:
        plans = [
            step.detail
            for statement in list(statements)
            if statement.startswith("SELECT")
            for step in connection.exec_driver_sql(
                f"EXPLAIN QUERY PLAN {statement}", (None,) * statement.count("?")
            )
        ]
    history = re.compile(r"^SCAN (operation|schedule_run|event)\b")
    assert plans
    assert [each for each in plans if history.match(each)] == []
