"""Farms: shown, extended, and what is asked of them becomes an operation, or is refused."""

from datetime import timedelta
from typing import Any

import pytest
from api_world import Refused, World
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from shared.database import now, reading, transaction
from shared.models import Clone, Event, Farm, Operation, Server

FARM = "/v1/farms/qa-{n}"


@pytest.fixture
def farm(world: World, server: Server) -> Farm:
    """Two clones that are ready, of which one runs, and one that failed."""
    made = world.farm(server)
    for number, state in ((1, "running"), (2, "stopped")):
        domain = world.domain(f"qa-{number}", state=state)
        clone = world.server(f"qa-{number}", domain_uuid=domain.uuid)
        world.clone(f"qa-{number}", farm_id=made.id, state="ready", server_id=clone.id)
    world.clone("qa-3", farm_id=made.id, state="failed", error={"code": "x", "message": "y"})
    return made


def made_of(response: Any) -> Operation:
    """The row behind a 202."""
    assert response.status_code == 202, response.json()
    assert response.headers["location"] == f"/v1/operations/{response.json()['id']}"
    row: Any = Operation
    with reading() as session:
        return session.scalars(select(Operation).where(row.id == response.json()["id"])).one()


def test_farm_is_what_one_request_makes(api: TestClient, server: Server) -> None:
    """Its clones name it, it names their pattern and source; until it is made its end is a
    number of hours."""
    body = {"name": "qa-{n:03}", "count": 3, "expires_in_h": 8}
    operation = made_of(api.post("/v1/servers/web-1/clones", json=body))
    (found,) = api.get("/v1/farms").json()["items"]
    assert found["name"] == "qa-{n:03}"
    assert found["source"] == {"kind": "server", "id": server.id}
    assert found["operation"] == operation.id
    assert (found["expires_in_h"], found["expires_at"]) == (8, None)
    assert (found["clones"], found["power"]) == ({"queued": 3}, {})
    assert api.get("/v1/clones/qa-002").json()["farm"] == found["id"]


@pytest.mark.parametrize("hours", ["0", "-1", "9000", '"8"', "true", "1e400", "NaN"])
def test_hours_that_cannot_be(
    api: TestClient, world: World, farm: Farm, refused: Refused, hours: str
) -> None:
    """Refused wherever they are given."""
    headers = {"Content-Type": "application/json"}
    for method, path, body in (
        ("POST", "/v1/servers/web-1/clones", '{"name": "x", "expires_in_h": %s}'),
        ("PATCH", FARM, '{"expires_in_h": %s}'),
    ):
        answer = api.request(method, path, content=body % hours, headers=headers)
        refused(answer, 422, "invalid_request")


def test_farm_shows_its_clones(api: TestClient, farm: Farm) -> None:
    """By name or id: counts by state and by what the VMs do, and each clone."""
    found = api.get(FARM).json()
    assert found == api.get(f"/v1/farms/{farm.id}").json()
    assert found["clones"] == {"ready": 2, "failed": 1}
    assert found["power"] == {"running": 1, "stopped": 1}
    assert [each["name"] for each in found["items"]] == ["qa-1", "qa-2", "qa-3"]


def test_vm_that_libvirt_has_not_is_missing(api: TestClient, world: World, farm: Farm) -> None:
    """A clone whose domain is gone counts as such."""
    gone = world.server("qa-4")
    world.clone("qa-4", farm_id=farm.id, state="ready", server_id=gone.id)
    assert api.get(FARM).json()["power"] == {"running": 1, "stopped": 1, "missing": 1}


def test_list_is_paged_and_without_those_that_are_gone(
    api: TestClient, world: World, server: Server, statements: list[str]
) -> None:
    """Newest first; as many statements for one as for many."""
    asked = []
    for number in range(5):
        world.farm(server, f"f{number}", deleted_at=now() if number == 2 else None)
        statements.clear()
        first = api.get("/v1/farms", params={"limit": 3}).json()
        asked.append(len(statements))
    second = api.get("/v1/farms", params={"limit": 3, "after": first["next"]}).json()
    names = [each["name"] for each in (*first["items"], *second["items"])]
    assert names == ["f4", "f3", "f1", "f0"]
    assert asked == asked[:1] * 5
    assert api.get("/v1/farms/f2").json()["code"] == "farm_not_found"


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/start", "farm.start"),
        ("POST", "/stop", "farm.stop"),
        ("POST", "/retry", "farm.retry"),
        ("DELETE", "", "farm.delete"),
    ],
)
def test_work_on_a_farm(
    api: TestClient, farm: Farm, refused: Refused, method: str, path: str, kind: str
) -> None:
    """Each becomes one operation, in the line of the farm's source; unknown farms do not."""
    operation = made_of(api.request(method, FARM + path))
    assert (operation.kind, operation.server_id) == (kind, farm.server_id)
    assert operation.command["farm"] == farm.id
    refused(api.request(method, f"/v1/farms/nothing{path}"), 404, "farm_not_found")


def test_two_farms_of_one_pattern(
    api: TestClient, world: World, server: Server, farm: Farm, refused: Refused
) -> None:
    """Neither is meant by it: nothing is deleted by mistake."""
    other = world.farm(server)
    problem = refused(api.delete(FARM), 409, "ambiguous_name")
    assert farm.id in problem["detail"]
    assert made_of(api.delete(f"/v1/farms/{other.id}")).command["farm"] == other.id


def test_stop_is_clean_unless_force_is_asked_for(
    api: TestClient, farm: Farm, refused: Refused
) -> None:
    """By default nobody's power is cut."""
    assert made_of(api.post(f"{FARM}/stop")).command["force"] is False
    asked = {"timeout_s": 5, "force": True}
    operation = made_of(api.post(f"{FARM}/stop", json=asked))
    assert {**asked, "farm": farm.id} == operation.command
    for bad in ({"timeout_s": 0}, {"timeout": 5}, {"force": "yes"}):
        refused(api.post(f"{FARM}/stop", json=bad), 422, "invalid_request")


# Retry


def test_retry_takes_what_failed_and_no_more(
    api: TestClient, farm: Farm, refused: Refused, any_database: str
) -> None:
    """The failed clone is queued under its name, for the new operation; while it is, there is
    nothing to retry."""
    operation = made_of(api.post(f"{FARM}/retry"))
    row: Any = Clone
    with reading() as session:
        taken = session.scalars(select(Clone).where(row.operation_id == operation.id)).all()
        assert [(each.name, each.state, each.error) for each in taken] == [("qa-3", "queued", None)]
    assert api.get(FARM).json()["clones"] == {"ready": 2, "queued": 1}
    refused(api.post(f"{FARM}/retry"), 409, "nothing_to_retry")


def test_retry_where_the_server_is_gone(
    api: TestClient, server: Server, farm: Farm, refused: Refused
) -> None:
    """It says what is gone, and nothing was started."""
    with transaction() as session:
        session.get_one(Server, server.id).forgotten_at = now()
    problem = refused(api.post(f"{FARM}/retry"), 409, "farm_source_gone")
    assert problem["conflict"] == server.id
    assert api.get(FARM).json()["clones"] == {"ready": 2, "failed": 1}


@pytest.mark.parametrize("what", ["deleted", "damaged"])
def test_retry_where_the_image_is_gone(
    api: TestClient, world: World, server: Server, refused: Refused, what: str
) -> None:
    """Or cannot be used any more."""
    gone = {"deleted_at": now()} if what == "deleted" else {"state": "damaged"}
    image = world.image(server, **gone)
    source = {"kind": "image", "id": image.id}
    made = world.farm(server, command={"source": source, "name": "qa-{n}", "count": 1})
    world.clone("qa-1", farm_id=made.id, state="failed")
    problem = refused(api.post(f"{FARM}/retry"), 409, "farm_source_gone")
    assert problem["conflict"] == image.id


def test_retry_of_another_snapshot(
    api: TestClient, world: World, server: Server, refused: Refused
) -> None:
    """One that was taken since is not what the farm was made from."""
    first = world.snapshot(server)
    source = {"kind": "snapshot", "id": server.id, "snapshot": first.id}
    command = {"source": source, "name": "qa-{n}", "count": 1}
    made = world.farm(server, command=command)
    world.clone("qa-1", farm_id=made.id, state="failed")
    with transaction() as session:
        session.merge(first).deleted_at = now()
    refused(api.post(f"{FARM}/retry"), 409, "farm_source_gone")
    second = world.snapshot(server)
    refused(api.post(f"{FARM}/retry"), 409, "farm_source_gone")
    with transaction() as session:
        session.merge(second).deleted_at = now()
        session.flush()
        session.merge(first).deleted_at = None
    assert made_of(api.post(f"{FARM}/retry")).kind == "farm.retry"


# The end


def test_end_is_set_extended_and_taken_away(api: TestClient, farm: Farm, any_database: str) -> None:
    """Each counts from now, is told, and makes beat look."""
    asked = now()
    for hours in (8, 0.5):
        changed = api.patch(FARM, json={"expires_in_h": hours})
        assert changed.status_code == 200, changed.json()
        with reading() as session:
            row = session.get_one(Farm, farm.id)
        assert row.expires_at is not None
        assert row.due_at is not None
        assert (
            timedelta(0) <= row.expires_at - asked - timedelta(hours=hours) < timedelta(minutes=2)
        )
        assert changed.json()["expires_in_h"] == hours
    changed = api.patch(FARM, json={"expires_in_h": None})
    assert (changed.json()["expires_at"], changed.json()["expires_in_h"]) == (None, None)
    with reading() as session:
        types = [each.type for each in session.scalars(select(Event))]
    assert types.count("triptych.farm.changed") == 3


def test_end_of_a_farm_whose_clones_are_all_gone(
    api: TestClient, farm: Farm, any_database: str
) -> None:
    """The old end was theirs: of what `retry` makes yet it counts anew."""
    api.patch(FARM, json={"expires_in_h": 1})
    with transaction() as session:
        session.execute(update(Clone).values(state="failed"))

    changed = api.patch(FARM, json={"expires_in_h": 24}).json()

    assert (changed["expires_in_h"], changed["expires_at"]) == (24, None)
    with reading() as session:
        assert session.get_one(Farm, farm.id).due_at is None


def test_end_must_be_said(api: TestClient, farm: Farm, refused: Refused) -> None:
    """An empty change is no wish for eternity."""
    refused(api.patch(FARM, json={}), 422, "invalid_request")


def test_end_of_a_farm_that_is_not_made_yet(api: TestClient, server: Server) -> None:
    """It counts from when it is."""
    api.post("/v1/servers/web-1/clones", json={"name": "qa-{n}", "count": 2})
    changed = api.patch(FARM, json={"expires_in_h": 4}).json()
    assert (changed["expires_in_h"], changed["expires_at"]) == (4, None)


def test_end_while_it_is_being_deleted(
    api: TestClient, world: World, server: Server, farm: Farm, refused: Refused
) -> None:
    """A deletion that runs is past that; one that waits is not."""
    command = {"farm": farm.id, "expired": True}
    work = world.operation(server, "farm.delete", command=command)
    assert api.patch(FARM, json={"expires_in_h": 1}).status_code == 200
    with transaction() as session:
        session.merge(work).state = "running"
    problem = refused(api.patch(FARM, json={"expires_in_h": 1}), 409, "server_busy")
    assert problem["operation"] == work.id


# Clones


def test_delete_a_clone(api: TestClient, farm: Farm, refused: Refused) -> None:
    """It stands in the line of the clone's own server; one that was never made in its farm's."""
    operation = made_of(api.delete("/v1/clones/qa-1"))
    assert operation.kind == "clone.delete"
    assert operation.server_id != farm.server_id
    assert made_of(api.delete("/v1/clones/qa-3")).server_id == farm.server_id
    refused(api.delete("/v1/clones/nobody"), 404, "clone_not_found")


def test_delete_a_clone_that_is_in_the_making(
    api: TestClient, server: Server, refused: Refused
) -> None:
    """It is not there yet; the operation that makes it can be cancelled."""
    operation = made_of(api.post("/v1/servers/web-1/clones", json={"name": "qa"}))
    problem = refused(api.delete("/v1/clones/qa"), 409, "server_busy")
    assert problem["operation"] == operation.id


def test_server_that_a_farm_s_work_holds(
    api: TestClient, world: World, server: Server, farm: Farm, refused: Refused
) -> None:
    """It is not forgotten meanwhile, and what is asked of it waits and says for what."""
    work = world.operation(server, "farm.stop", command={"farm": farm.id}, state="running")
    with transaction() as session:
        row: Any = Server
        held = session.scalars(select(Server).where(row.name == "qa-1")).one()
        held.held_by = work.id
    problem = refused(api.delete("/v1/servers/qa-1"), 409, "server_busy")
    assert problem["operation"] == work.id
    waiting = api.post("/v1/servers/qa-1/images").json()["waiting"]
    assert waiting == f"Behind operation {work.id} (farm.stop) on this server."


def test_farm_ends_with_the_last_clone_that_is_forgotten(
    api: TestClient, world: World, server: Server, farm: Farm
) -> None:
    """What was never made keeps it, since that can be tried again; else an empty farm is none."""
    assert api.delete("/v1/servers/qa-1").status_code == 200
    assert api.delete("/v1/servers/qa-2").status_code == 200
    assert api.get(f"/v1/farms/{farm.id}").json()["clones"] == {"failed": 1}
    other = world.farm(server, name="alone", expires_in_h=8.0)
    clone = world.server("alone")
    world.clone("alone", farm_id=other.id, state="ready", server_id=clone.id)

    assert api.delete("/v1/servers/alone").status_code == 200

    assert api.get(f"/v1/farms/{other.id}").status_code == 404
    assert [each["id"] for each in api.get("/v1/farms").json()["items"]] == [farm.id]
    (told,) = [
        each["data"]
        for each in api.get("/v1/events").json()["items"]
        if each["type"] == "triptych.farm.deleted"
    ]
    assert (told["farm"], told["name"]) == (other.id, "alone")
