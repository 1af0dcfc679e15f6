"""Snapshots, images and clones: what is asked for becomes an operation, or is refused."""

from datetime import timedelta
from typing import Any

import pytest
from api_world import Refused, World
from fastapi.testclient import TestClient
from sqlalchemy import select

from shared.database import now, reading
from shared.models import Clone, Image, Operation, OutboxMessage, Server


def stored(response: Any) -> Operation:
    """The row behind a 202, which points at it and will wake its worker."""
    assert response.status_code == 202, response.json()
    made = response.json()
    assert f"/v1/operations/{made['id']}" == response.headers["location"]
    assert (made["state"], made["progress"], made["error"]) == ("queued", 0, None)
    with reading() as session:
        messages = [each.arguments for each in session.scalars(select(OutboxMessage))]
        assert {"operation_id": made["id"]} in messages
        row: Any = Operation
        return session.scalars(select(Operation).where(row.id == made["id"])).one()


def test_take_snapshot(api: TestClient, server: Server) -> None:
    """Taking a snapshot answers 202 with no broker in reach, and no body is needed."""
    operation = stored(api.post("/v1/servers/web-1/snapshot"))
    assert ("snapshot.take", server.id) == (operation.kind, operation.server_id)
    assert operation.requested_by == "token:bootstrap"
    assert {
        "server": server.id,
        "replace": False,
        "with_memory": False,
        "quiesce": "auto",
        "description": "",
    } == operation.command


def test_second_snapshot(api: TestClient, world: World, server: Server, refused: Refused) -> None:
    """S1: a second snapshot is refused with the first as `conflict`, unless it replaces."""
    first = world.snapshot(server)
    problem = refused(api.post("/v1/servers/web-1/snapshot", json={}), 409, "snapshot_exists")
    assert first.id == problem["conflict"]
    assert "replace" in problem["detail"]
    operation = stored(api.post("/v1/servers/web-1/snapshot", json={"replace": True}))
    assert operation.command["replace"]


def test_show_snapshot(api: TestClient, world: World, server: Server) -> None:
    """A snapshot has exactly the promised fields; times are UTC with Z."""
    taken = world.snapshot(server, description="before")
    found = api.get("/v1/servers/web-1/snapshot").json()
    assert set(found) == {
        *("id", "server", "taken_at", "expires_at", "with_memory", "consistency", "way"),
        *("pause_ms", "bytes", "unique_bytes", "description"),
    }
    assert (taken.id, server.id, 9.5) == (found["id"], found["server"], found["pause_ms"])
    assert taken.expires_at.isoformat().replace("+00:00", "Z") == found["expires_at"]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_no_snapshot_is_kept_longer(
    api: TestClient, world: World, server: Server, refused: Refused, method: str
) -> None:
    """S2: it expires when it does. Nothing sets that later, not even when it is taken: who wants
    it for longer promotes it."""
    taken = world.snapshot(server)
    path = "/v1/servers/web-1/snapshot"
    later = {"expires_at": "2099-01-01T00:00:00Z"}
    refused(api.request(method, path, json=later), 405, "method_not_allowed")
    refused(api.post(path, json={"replace": True, **later}), 422, "invalid_request")
    api.post(f"{path}/promote", json={})
    found = api.get(path).json()["expires_at"]
    assert taken.expires_at.isoformat().replace("+00:00", "Z") == found


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "snapshot"),
        ("DELETE", "snapshot"),
        ("POST", "snapshot/revert"),
        ("POST", "snapshot/promote"),
    ],
)
def test_no_snapshot(
    api: TestClient, server: Server, refused: Refused, method: str, path: str
) -> None:
    """Without a snapshot there is nothing to show, delete, revert to or promote."""
    refused(api.request(method, f"/v1/servers/web-1/{path}"), 404, "snapshot_not_found")


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("DELETE", "snapshot", "snapshot.delete"),
        ("POST", "snapshot/revert", "snapshot.revert"),
        ("POST", "snapshot/promote", "snapshot.promote"),
    ],
)
def test_work_on_a_snapshot(
    api: TestClient, world: World, server: Server, method: str, path: str, kind: str
) -> None:
    """Each becomes an operation of its kind."""
    world.snapshot(server)
    assert kind == stored(api.request(method, f"/v1/servers/web-1/{path}")).kind


@pytest.mark.parametrize(
    "path",
    ["snapshot", "snapshot/revert", "snapshot/promote", "images", "clones", "snapshot/clones"],
)
def test_work_on_an_unknown_server(api: TestClient, refused: Refused, path: str) -> None:
    """No work starts on a server that is not registered."""
    response = api.post(f"/v1/servers/nobody/{path}", json={"name": "x"} if "clone" in path else {})
    assert "'nobody'" in refused(response, 404, "server_not_found")["detail"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("snapshot", {"replaces": True}, "replaces"),
        ("snapshot", {"replace": "yes"}, "replace"),
        ("snapshot", {"quiesce": "perhaps"}, "quiesce"),
        ("snapshot", {"description": "x" * 1001}, "description"),
        ("snapshot/revert", {"dry_run": True}, "dry_run"),
        ("images", {"name": "a/b"}, "name"),
        ("images", {"name": "x" * 300}, "name"),
        ("images", {"name": ""}, "name"),
        ("images", {"name": "../../etc"}, "name"),
        ("images", {"server": "web-2"}, "server"),
        ("clones", {}, "name"),
        ("clones", {"name": "a/b"}, "name"),
        ("clones", {"name": "x" * 300}, "name"),
        ("clones", {"name": "{n.__class__}"}, "name"),
        ("clones", {"name": "qa-{n}", "count": 0}, "count"),
        ("clones", {"name": "qa-{n}", "count": 101}, "count"),
        ("clones", {"name": "qa", "vcpus": 0}, "vcpus"),
        ("clones", {"name": "qa", "memory_mib": 1}, "memory_mib"),
        ("clones", {"name": "qa", "source": {"kind": "image", "id": "x"}}, "source"),
        ("clones", {"name": "qa", "count": 2}, "body"),
        ("snapshot/clones", {"name": "qa", "quiesce": "auto"}, "quiesce"),
    ],
)
def test_bad_bodies(
    api: TestClient,
    world: World,
    server: Server,
    refused: Refused,
    path: str,
    body: Any,
    field: str,
) -> None:
    """Each bad body is refused with the field at fault, and nothing is started."""
    world.snapshot(server)
    problem = refused(api.post(f"/v1/servers/web-1/{path}", json=body), 422, "invalid_request")
    assert [field] == [each["field"] for each in problem["errors"]]
    assert api.get("/v1/operations").json()["items"] == []


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("servers/web-1/snapshot", {"quiesce": "require"}),
        ("servers/web-1/clones", {"name": "qa", "quiesce": "require"}),
        ("servers/web-1/clones", {"name": "qa", "start": False}),
        ("servers/web-1/clones", {"name": "qa", "identity": "offline"}),
        ("servers/web-1/clones", {"name": "qa", "identity": "cloud-init"}),
        ("images/first/clones", {"name": "qa"}),
    ],
)
def test_memory_is_not_supported(
    api: TestClient,
    world: World,
    server: Server,
    refused: Refused,
    path: str,
    more: dict[str, Any],
) -> None:
    """What cannot be, or nobody should ask for, is refused, not ignored."""
    world.image(server)
    body = {"with_memory": True, **more}
    refused(api.post(f"/v1/{path}", json=body), 422, "unsupported")


def test_clones_with_memory(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """C5: of a server, and of its snapshot where that holds the memory."""
    body = {"name": "qa-{n}", "count": 2, "with_memory": True}
    stored(api.post("/v1/servers/web-1/clones", json=body))
    assert [each["with_memory"] for each in api.get("/v1/clones").json()["items"]] == [True, True]
    snapshot = world.snapshot(server)
    of_snapshot = "/v1/servers/web-1/snapshot/clones"
    response = api.post(of_snapshot, json={"name": "disks", "with_memory": True})
    assert refused(response, 409, "snapshot_without_memory")["conflict"] == snapshot.id


def test_create_image(api: TestClient, server: Server) -> None:
    """Creating an image takes the server by id too, and remembers what was asked."""
    body = {"name": "before-3.2", "pinned": True, "quiesce": "never"}
    operation = stored(api.post(f"/v1/servers/{server.id}/images", json=body))
    assert operation.kind == "image.create"
    assert body == {name: operation.command[name] for name in body}


def test_image_name_taken(api: TestClient, world: World, server: Server, refused: Refused) -> None:
    """Two images of one server do not share a name."""
    image = world.image(server, "first")
    response = api.post("/v1/servers/web-1/images", json={"name": "first"})
    assert image.id == refused(response, 409, "image_name_taken")["conflict"]


def test_show_image(api: TestClient, world: World, server: Server) -> None:
    """An image has exactly the promised fields; what is not known is null and says why."""
    image = world.image(server, left_out=[{"target": "sda", "reason": "CD-ROM"}])
    found = api.get("/v1/images/first").json()
    assert found == api.get(f"/v1/images/{image.id}").json()
    assert set(found) == {
        *("id", "name", "server", "created_at", "description", "pinned", "origin", "state"),
        *("way", "consistency", "pause_ms", "bytes", "unique_bytes", "verified", "proof"),
        "left_out",
    }
    assert found["verified"] == {"at": None, "result": None}
    assert found["proof"] == {
        "at": None,
        "result": "not_run",
        "reason": "boot proof not available in this version",
    }
    assert found["left_out"] == [{"target": "sda", "reason": "CD-ROM"}]


def test_list_images(api: TestClient, world: World, server: Server) -> None:
    """Images are listed newest first, all or those of a server or an origin."""
    other = world.server("web-2")
    world.image(server, "first")
    world.image(other, "second", origin="daily")
    world.image(server, "third", origin="daily")
    world.image(server, "gone", deleted_at=now())

    def names(path: str, **query: str) -> list[str]:
        return [each["name"] for each in api.get(path, params=query).json()["items"]]

    assert names("/v1/images") == ["third", "second", "first"]
    assert names("/v1/images", server="web-1") == ["third", "first"]
    assert names("/v1/servers/web-1/images") == ["third", "first"]
    assert names("/v1/images", server=server.id, origin="daily") == ["third"]
    assert names("/v1/servers/web-1/images", origin="daily") == ["third"]


def test_filter_by_nonsense(api: TestClient, refused: Refused) -> None:
    """A filter for what cannot be is refused, where an empty list would mislead."""
    refused(api.get("/v1/images", params={"origin": "stolen"}), 422, "invalid_request")
    refused(api.get("/v1/images", params={"server": "nobody"}), 404, "server_not_found")
    refused(api.get("/v1/servers/nobody/images"), 404, "server_not_found")


def test_images_of_a_forgotten_server(api: TestClient, world: World) -> None:
    """I2: they stay reachable, by the id of the server."""
    gone = world.server("gone", forgotten_at=now())
    image = world.image(gone)
    items = api.get(f"/v1/servers/{gone.id}/images").json()["items"]
    assert [image.id] == [each["id"] for each in items]
    assert gone.id == stored(api.post(f"/v1/images/{image.id}/restore")).server_id


def test_change_image(api: TestClient, world: World, server: Server) -> None:
    """A change touches what was sent and nothing else; null is no change."""
    image = world.image(server, description="kept")
    changed = api.patch("/v1/images/first", json={"pinned": True, "name": None})
    assert changed.status_code == 200
    assert tuple(changed.json()[name] for name in ("pinned", "name", "description")) == (
        True,
        "first",
        "kept",
    )
    renamed = api.patch("/v1/images/first", json={"name": "second"}).json()
    assert renamed == api.get(f"/v1/images/{image.id}").json()
    assert (renamed["name"], renamed["pinned"]) == ("second", True)


@pytest.mark.parametrize(
    "body", [{"state": "complete"}, {"name": "a/b"}, {"pinned": "no"}, {"name": "x" * 300}]
)
def test_bad_change(
    api: TestClient, world: World, server: Server, refused: Refused, body: Any
) -> None:
    """Only name, description and pinned can change, and to valid values."""
    world.image(server)
    refused(api.patch("/v1/images/first", json=body), 422, "invalid_request")


def test_rename_to_a_taken_name(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """A rename cannot make two of one name; to its own name it does nothing."""
    taken = world.image(server, "taken")
    world.image(server, "first")
    response = api.patch("/v1/images/first", json={"name": "taken"})
    assert taken.id == refused(response, 409, "image_name_taken")["conflict"]
    assert api.patch("/v1/images/first", json={"name": "first"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("DELETE", "", "image.delete"),
        ("POST", "/restore", "image.restore"),
        ("POST", "/verify", "image.verify"),
    ],
)
def test_work_on_an_image(
    api: TestClient,
    world: World,
    server: Server,
    refused: Refused,
    method: str,
    path: str,
    kind: str,
) -> None:
    """Each becomes an operation of its kind on the image's server; unknown images do not."""
    image = world.image(server)
    operation = stored(api.request(method, f"/v1/images/first{path}"))
    assert (kind, server.id, image.id) == (
        operation.kind,
        operation.server_id,
        operation.command["image"],
    )
    refused(api.request(method, f"/v1/images/nothing{path}"), 404, "image_not_found")


def test_unusable_image(api: TestClient, world: World, server: Server, refused: Refused) -> None:
    """A damaged image is neither restored nor cloned."""
    world.image(server, state="damaged")
    refused(api.post("/v1/images/first/restore"), 409, "image_not_usable")
    response = api.post("/v1/images/first/clones", json={"name": "qa"})
    refused(response, 409, "image_not_usable")


def test_boot_proof_is_not_supported(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """A proof that cannot be run is refused, not reported as run."""
    world.image(server)
    refused(api.post("/v1/images/first/verify", json={"boot": True}), 422, "unsupported")


@pytest.mark.parametrize("source", ["server", "snapshot", "image"])
def test_clone(api: TestClient, world: World, server: Server, source: str) -> None:
    """A farm from a server, its snapshot or an image is one operation and its planned clones."""
    snapshot = world.snapshot(server)
    image = world.image(server)
    path = {
        "server": "/v1/servers/web-1/clones",
        "snapshot": "/v1/servers/web-1/snapshot/clones",
        "image": "/v1/images/first/clones",
    }[source]
    operation = stored(api.post(path, json={"name": "qa-{n:03}", "count": 3, "vcpus": 1}))
    of = image.id if source == "image" else server.id
    meant = snapshot.id if source == "snapshot" else None
    assert {"kind": source, "id": of, "snapshot": meant} == operation.command["source"]
    clones = api.get("/v1/clones").json()["items"]
    assert {"qa-001", "qa-002", "qa-003"} == {each["name"] for each in clones}
    one = api.get("/v1/clones/qa-002").json()
    assert {"kind": source, "id": of} == one["source"]
    assert (one["state"], one["server"], one["error"]) == ("queued", None, None)
    assert (one["identity"]["way"], one["identity"]["kept"]) == (None, [])
    assert operation.id == one["operation"]


def test_a_clone_says_what_of_it_is_not_its_own(api: TestClient, world: World) -> None:
    """What was renewed, what will be, what is its source's and what is missing, each with why."""
    identity = {
        "way": "cloud-init",
        "hostname": "qa-1",
        "renewed": ["name"],
        "pending": [{"part": "hostname", "reason": "at its boot"}],
        "kept": [{"part": "machine-id", "reason": "no agent"}],
        "left_out": [{"target": "hostdev pci", "reason": "it belongs to one guest"}],
    }
    world.clone("qa-1", identity=identity)
    assert identity == api.get("/v1/clones/qa-1").json()["identity"]
    assert api.get("/v1/clones").json()["items"][0]["identity"] == identity


def test_an_agent_of_a_clone_that_is_not_started(
    api: TestClient, server: Server, refused: Refused
) -> None:
    """It cannot renew anything, so the wish is refused; the other ways are accepted."""
    body = {"name": "qa", "identity": "agent", "start": False}
    refused(api.post("/v1/servers/web-1/clones", json=body), 422, "unsupported")
    for way in ("auto", "cloud-init", "offline", "keep"):
        wish = {"name": f"by-{way}", "identity": way, "start": False}
        assert api.post("/v1/servers/web-1/clones", json=wish).status_code == 202


def test_clone_name_taken(api: TestClient, world: World, server: Server, refused: Refused) -> None:
    """A name of a domain, or of a clone in the making, is refused and named."""
    world.domain("qa-2")
    response = api.post("/v1/servers/web-1/clones", json={"name": "qa-{n}", "count": 3})
    assert refused(response, 409, "clone_name_taken")["conflict"] == "qa-2"
    stored(api.post("/v1/servers/web-1/clones", json={"name": "staging"}))
    response = api.post("/v1/servers/web-1/clones", json={"name": "staging"})
    refused(response, 409, "clone_name_taken")


def test_more_clones_of_a_pattern(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """The refusal says from which number on there is room, past domains and clones in the making;
    asked so, they are made."""
    asked = {"name": "qa-{n:02}", "count": 3}
    stored(api.post("/v1/servers/web-1/clones", json=asked))
    world.domain("qa-05")

    response = api.post("/v1/servers/web-1/clones", json=asked)

    problem = refused(response, 409, "clone_name_taken")
    assert "`first: 6`" in problem["detail"]
    more = stored(api.post("/v1/servers/web-1/clones", json={**asked, "first": 6}))
    with reading() as session:
        query = select(Clone.name).where(Clone.operation_id == more.id)
        assert sorted(session.scalars(query)) == ["qa-06", "qa-07", "qa-08"]
    api_says = api.post("/v1/servers/web-1/clones", json={"name": "qa", "first": 2})
    refused(api_says, 422, "invalid_request")


def test_clone_name_of_a_clone_whose_domain_is_gone(
    api: TestClient, world: World, server: Server
) -> None:
    """Who undefined a clone by hand may use its name again."""
    world.clone("qa", state="ready")

    response = api.post("/v1/servers/web-1/clones", json={"name": "qa"})

    assert response.status_code == 202


def test_clones_that_are_gone(api: TestClient, world: World, refused: Refused) -> None:
    """A deleted clone leaves the list, but its lineage is there by id."""
    gone = world.clone("qa", state="deleted")
    assert api.get("/v1/clones").json()["items"] == []
    assert api.get(f"/v1/clones/{gone.id}").json()["state"] == "deleted"
    refused(api.get("/v1/clones/qa"), 404, "clone_not_found")


def test_failed_clone_says_why(api: TestClient, world: World) -> None:
    """C4: each clone has its own outcome."""
    error = {"code": "insufficient_space", "message": "No room."}
    world.clone("qa", state="failed", error=error)
    assert error == api.get("/v1/clones/qa").json()["error"]


def test_idempotency(api: TestClient, server: Server, refused: Refused) -> None:
    """E4: the same key gives the same operation; for another request it is refused."""
    headers = {"Idempotency-Key": "k-1"}
    path = "/v1/servers/web-1/images"
    first = api.post(path, json={"name": "a"}, headers=headers)
    again = api.post(path, json={"name": "a"}, headers=headers)
    assert (202, first.json()["id"]) == (again.status_code, again.json()["id"])
    problem = refused(api.post(path, json={"name": "b"}, headers=headers), 409, REUSED)
    assert first.json()["id"] == problem["operation"]
    assert len(api.get("/v1/operations").json()["items"]) == 1


REUSED = "idempotency_key_reused"


def test_replay_when_the_work_is_done(api: TestClient, world: World, server: Server) -> None:
    """A replay gives the operation even where the request would now be refused."""
    headers = {"Idempotency-Key": "k-2"}
    first = api.post("/v1/servers/web-1/snapshot", headers=headers).json()
    world.snapshot(server)
    again = api.post("/v1/servers/web-1/snapshot", headers=headers)
    assert (202, first["id"]) == (again.status_code, again.json()["id"])


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x01b"])
def test_bad_idempotency_key(api: TestClient, server: Server, refused: Refused, key: str) -> None:
    """A key is 1 to 255 printable characters."""
    response = api.post("/v1/servers/web-1/images", headers={"Idempotency-Key": key})
    refused(response, 422, "invalid_request")


def test_idempotency_keys_do_not_meet_those_of_the_queue(
    api: TestClient, world: World, server: Server
) -> None:
    """A caller cannot occupy the key of a schedule's slot or a message."""
    world.operation(server, idempotency_key="slot:sch_1:2026", request_hash="x")
    stored(api.post("/v1/servers/web-1/images", headers={"Idempotency-Key": "slot:sch_1:2026"}))


def test_expired_but_not_yet_swept(api: TestClient, world: World, server: Server) -> None:
    """A snapshot past its time is shown as long as it is there, with when it expired."""
    world.snapshot(server, expires_at=now() - timedelta(seconds=30))
    assert api.get("/v1/servers/web-1/snapshot").status_code == 200


def test_nothing_is_written_when_refused(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """A refused farm leaves no operation, no clone and no message."""
    world.domain("qa-2")
    api.post("/v1/servers/web-1/clones", json={"name": "qa-{n}", "count": 3})
    with reading() as session:
        for table in (Operation, OutboxMessage, Clone, Image):
            assert session.scalars(select(table)).first() is None
