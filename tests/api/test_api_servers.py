"""Hosts, their domains, and registering and forgetting servers."""

import threading
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from api_world import Refused, World
from fastapi.testclient import TestClient

from services.api import servers
from shared.database import SQLITE_PATIENCE, now, transaction
from shared.models import Domain, Schedule, Server


def test_hosts(api: TestClient, world: World) -> None:
    """A host shows what it can do and that it answers."""
    (host,) = api.get("/v1/hosts").json()["items"]
    assert (host["name"], host["answering"], host["reflink"]) == ("kvm-1", True, True)
    assert host == api.get("/v1/hosts/kvm-1").json()


def test_host_says_what_its_copies_take_up(api: TestClient, world: World, server: Server) -> None:
    """Beside the room that is free: what was measured, and what would be freed."""
    measured_at = now()
    world.image(server, bytes=100, unique_bytes=30, measured_at=measured_at)
    world.image(server, "gone", bytes=7, unique_bytes=7, deleted_at=now())
    world.snapshot(server, bytes=50)
    assert api.get("/v1/hosts/kvm-1").json()["vault_usage"] == {
        "copies": 2,
        "measured": 1,
        "apparent_bytes": 150,
        "unique_bytes": 30,
        "shared_bytes": 70,
        "measured_at": measured_at.isoformat().replace("+00:00", "Z"),
    }


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, (True, False)),
        ({"last_seen_at": None}, (False, True)),
        ({"last_seen_at": now() - timedelta(seconds=91)}, (False, True)),
        ({"problem": "libvirt does not answer: gone"}, (False, False)),
    ],
)
def test_silence_is_told_from_trouble(
    api: TestClient, world: World, fields: dict[str, Any], shown: tuple[bool, bool]
) -> None:
    """A host whose workers live but whose libvirt is away does not answer, but is not silent."""
    world.host("kvm-2", **fields)
    found = api.get("/v1/hosts/kvm-2").json()
    assert shown == (found["answering"], found["silent"])


@pytest.mark.parametrize("path", ["/v1/hosts/nowhere", "/v1/hosts/nowhere/domains"])
def test_unknown_host(api: TestClient, refused: Refused, path: str) -> None:
    """An unknown host is named in the problem."""
    assert "'nowhere'" in refused(api.get(path), 404, "host_not_found")["detail"]


def test_domains(api: TestClient, world: World, server: Server) -> None:
    """All of the host's domains are listed; the registered ones name their server."""
    world.domain("other")
    found = {each["name"]: each for each in api.get("/v1/hosts/kvm-1/domains").json()["items"]}
    assert {"web-1": server.id, "other": None} == {
        name: each["server"] for name, each in found.items()
    }
    assert found["web-1"]["disks"][0]["target"] == "vda"


@pytest.mark.parametrize("by", ["name", "uuid", "UUID"])
def test_register(api: TestClient, world: World, by: str) -> None:
    """A domain is registered by its name or UUID, under its own name."""
    domain = world.domain("web-9")
    wanted = domain.name if by == "name" else domain.uuid
    response = api.post(
        "/v1/servers",
        json={"host": "kvm-1", "domain": wanted.upper() if by == "UUID" else wanted},
    )
    made = response.json()
    assert response.status_code == 201
    assert f"/v1/servers/{made['id']}" == response.headers["location"]
    assert {
        "id": made["id"],
        "name": "web-9",
        "host": "kvm-1",
        "domain": "web-9",
        "uuid": domain.uuid,
        "state": "running",
        "vcpus": 2,
        "memory_bytes": 1 << 31,
        "disks": domain.disks,
        "snapshot": None,
        "newest_image": None,
    } == made
    assert made == api.get("/v1/servers/web-9").json() == api.get("/v1/servers").json()["items"][0]


def test_register_waits_for_the_inventory(
    api: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A domain defined a moment ago is found once the host has reported it."""
    monkeypatch.setattr(servers, "INVENTORY_LAG", 60)
    threading.Timer(0.3, world.domain, ["late"]).start()
    response = api.post("/v1/servers", json={"host": "kvm-1", "domain": "late"})
    assert response.status_code == 201


def test_register_unknown_domain(
    api: TestClient, world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A domain that the host does not have is refused after a short wait."""
    monkeypatch.setattr(servers, "INVENTORY_LAG", 0.3)
    began = time.monotonic()
    response = api.post("/v1/servers", json={"host": "kvm-1", "domain": "nobody"})
    refused(response, 404, "domain_not_found")
    assert 0.3 <= time.monotonic() - began < 30


@pytest.mark.parametrize(
    "fields",
    [
        {"problem": "libvirt does not answer: connection refused"},
        {"last_seen_at": now() - timedelta(minutes=5)},
        {"last_seen_at": None},
    ],
)
def test_register_on_a_host_that_does_not_answer(
    api: TestClient, world: World, refused: Refused, fields: dict[str, Any]
) -> None:
    """Nobody can say whether the domain exists: 503 with the reason, not 404."""
    world.host("kvm-2", **fields)
    response = api.post("/v1/servers", json={"host": "kvm-2", "domain": "web"})
    problem = refused(response, 503, "host_not_answering")
    assert (fields.get("problem") or "90 seconds") in problem["detail"]


def test_register_known_domain_of_a_silent_host(api: TestClient, world: World) -> None:
    """A domain that the host reported before it fell silent can be registered."""
    world.host("kvm-2", problem="libvirt does not answer")
    world.domain("web", host="kvm-2")
    response = api.post("/v1/servers", json={"host": "kvm-2", "domain": "web"})
    assert response.status_code == 201


def test_register_twice(api: TestClient, server: Server, refused: Refused) -> None:
    """A domain is registered once; the refusal names the server that it is."""
    response = api.post("/v1/servers", json={"host": "kvm-1", "domain": "web-1"})
    assert server.id == refused(response, 409, "server_exists")["conflict"]


@pytest.mark.parametrize("disks", [[], [{"target": "sda", "format": "raw", "writable": False}]])
def test_register_without_disks(
    api: TestClient, world: World, refused: Refused, disks: list[Any]
) -> None:
    """A domain with nothing to copy is refused."""
    world.domain("diskless", disks=disks)
    response = api.post("/v1/servers", json={"host": "kvm-1", "domain": "diskless"})
    refused(response, 422, "domain_without_disks")


def test_register_a_clone_in_the_making(api: TestClient, world: World, refused: Refused) -> None:
    """A clone registers itself when it is done; nobody can grab it half-made."""
    world.domain("qa-1")
    world.clone("qa-1", state="making", operation_id="op_making")
    response = api.post("/v1/servers", json={"host": "kvm-1", "domain": "qa-1"})
    assert refused(response, 409, "server_busy")["operation"] == "op_making"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"host": "kvm-1"}, "domain"),
        ({"host": "kvm-1", "domain": ""}, "domain"),
        ({"host": "kvm-1", "domain": 7}, "domain"),
        ({"host": "kvm-1", "domain": "web-1", "colour": "red"}, "colour"),
        ([], "body"),
    ],
)
def test_register_with_a_bad_body(api: TestClient, refused: Refused, body: Any, field: str) -> None:
    """Each bad body is refused with the field at fault."""
    problem = refused(api.post("/v1/servers", json=body), 422, "invalid_request")
    assert field == problem["errors"][0]["field"]
    assert f"`{field}`" in problem["detail"]


def test_server_whose_domain_is_gone(api: TestClient, world: World) -> None:
    """A server without its domain is missing, not an error."""
    world.server("ghost")
    found = api.get("/v1/servers/ghost").json()
    assert (found["state"], found["vcpus"], found["disks"]) == ("missing", None, [])


def test_server_shows_its_copies(api: TestClient, world: World, server: Server) -> None:
    """A server names its live snapshot and its newest whole image, no deleted or broken one."""
    world.snapshot(server, deleted_at=now())
    snapshot = world.snapshot(server)
    world.image(server, "old")
    newest = world.image(server, "new")
    world.image(server, "broken", state="damaged")
    world.image(server, "gone", deleted_at=now())
    found = api.get(f"/v1/servers/{server.id}").json()
    assert (snapshot.id, newest.id) == (found["snapshot"], found["newest_image"])


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_unknown_server(api: TestClient, refused: Refused, method: str) -> None:
    """An unknown server is named in the problem."""
    problem = refused(api.request(method, "/v1/servers/nobody"), 404, "server_not_found")
    assert "'nobody'" in problem["detail"]


def test_ambiguous_name(api: TestClient, world: World, refused: Refused) -> None:
    """Two servers of one name (on two hosts) are told apart by id only."""
    first, second = world.server("web"), world.server("web")
    problem = refused(api.get("/v1/servers/web"), 409, "ambiguous_name")
    assert first.id in problem["detail"]
    assert second.id in problem["detail"]


def test_forget(api: TestClient, world: World, server: Server) -> None:
    """Forgetting ends schedules and keeps images, and says so; registering again brings the id
    back."""
    image = world.image(server)
    world.image(server, "gone", deleted_at=now())
    world.add(
        Schedule(
            server_id=server.id, kind="daily", at="03:00", timezone="UTC", keep=7, catch_up_s=60
        )
    )
    response = api.delete("/v1/servers/web-1")
    answer = response.json()
    assert (response.status_code, answer["id"]) == (200, server.id)
    assert (answer["images_kept"], answer["images_kept_bytes"]) == (1, image.bytes)
    assert answer["schedules_ended"] == ["daily"]
    kept = api.get(f"/v1/servers/{answer['id']}/images").json()["items"]
    assert [image.id] == [each["id"] for each in kept]
    assert api.get("/v1/servers/web-1").status_code == 404
    assert [image.id] == [each["id"] for each in api.get("/v1/images").json()["items"]]
    again = api.post("/v1/servers", json={"host": "kvm-1", "domain": "web-1"}).json()
    assert (server.id, image.id) == (again["id"], again["newest_image"])
    assert api.get("/v1/servers/web-1/schedules/daily").status_code == 404


def test_revived_server_has_its_domains_name(api: TestClient, world: World) -> None:
    """A domain renamed in between is registered under its new name, with its old id."""
    uuid = str(uuid4())
    old = world.server("old-name", domain_uuid=uuid, forgotten_at=now())
    world.domain("new-name", uuid=uuid)
    again = api.post("/v1/servers", json={"host": "kvm-1", "domain": "new-name"}).json()
    assert (old.id, "new-name") == (again["id"], again["name"])


@pytest.mark.parametrize("state", ["queued", "running"])
def test_forget_while_busy(
    api: TestClient, world: World, server: Server, refused: Refused, state: str
) -> None:
    """A server that is worked on cannot be forgotten; the refusal names the operation."""
    operation = world.operation(server, state=state)
    problem = refused(api.delete("/v1/servers/web-1"), 409, "server_busy")
    assert operation.id == problem["operation"]


def test_forget_with_a_snapshot(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """A snapshot would be out of reach: it must be deleted first."""
    snapshot = world.snapshot(server)
    problem = refused(api.delete("/v1/servers/web-1"), 409, "snapshot_exists")
    assert snapshot.id == problem["conflict"]
    assert "delete the snapshot first" in problem["detail"]


def test_pages(api: TestClient, world: World) -> None:
    """Pages join up to the whole list, also when something is added in between."""
    names = [world.server(f"web-{n}").name for n in range(5)]
    first = api.get("/v1/servers", params={"limit": 2})
    assert names[:2] == [each["name"] for each in first.json()["items"]]
    world.server("web-5")
    link = first.headers["link"]
    assert link.endswith('; rel="next"')
    second = api.get(link.split(">")[0].removeprefix("<")).json()
    third = api.get("/v1/servers", params={"limit": 2, "after": second["next"]}).json()
    assert [*names[2:], "web-5"] == [each["name"] for each in second["items"] + third["items"]]
    assert third["next"] is None


@pytest.mark.parametrize(
    "after", ["nonsense", "", "!!", "WyJ4Iiwx", "WyJzZXJ2ZXIuaWQiLCAxXQ", "bnVsbA", "x" * 500]
)
def test_bad_cursor(api: TestClient, refused: Refused, after: str) -> None:
    """What no page gave out is no cursor."""
    problem = refused(api.get("/v1/servers", params={"after": after}), 422, "invalid_request")
    assert problem["errors"][0]["field"] == "after"


def test_cursor_of_another_list(api: TestClient, world: World, refused: Refused) -> None:
    """A cursor of one list is refused by another."""
    world.server("web-1")
    world.server("web-2")
    cursor = api.get("/v1/servers", params={"limit": 1}).json()["next"]
    refused(api.get("/v1/images", params={"after": cursor}), 422, "invalid_request")
    refused(api.get("/v1/operations", params={"after": cursor}), 422, "invalid_request")


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 201}, {"limit": "many"}, {"colour": "red"}]
)
def test_bad_query(api: TestClient, refused: Refused, query: dict[str, Any]) -> None:
    """A limit outside 1–200 and an unknown parameter are refused by name."""
    problem = refused(api.get("/v1/servers", params=query), 422, "invalid_request")
    assert next(iter(query)) == problem["errors"][0]["field"]


def test_events(api: TestClient, world: World) -> None:
    """What changed is told as CloudEvents, newest first, by server and type."""
    world.domain("web-1")
    made = api.post("/v1/servers", json={"host": "kvm-1", "domain": "web-1"}).json()
    api.delete("/v1/servers/web-1")
    page = api.get("/v1/events", params={"server": made["id"]}).json()
    types = [each["type"] for each in page["items"]]
    assert types == ["triptych.server.forgotten", "triptych.server.registered"]
    event = page["items"][0]
    assert ("1.0", made["id"]) == (event["specversion"], event["subject"])
    assert event["time"].endswith("Z")
    only = api.get("/v1/events", params={"type": "triptych.server.forgotten"}).json()["items"]
    assert [event] == only


def test_reading_does_not_wait_for_a_writer(api: TestClient, world: World, server: Server) -> None:
    """While a worker holds SQLite's write lock, the API still answers."""
    with transaction() as session:
        session.add(
            Domain(host="kvm-1", uuid="u", name="n", state="running", vcpus=1, memory_bytes=1)
        )
        session.flush()
        began = time.monotonic()
        assert api.get("/v1/servers/web-1").status_code == 200
        assert time.monotonic() - began < SQLITE_PATIENCE / 2
