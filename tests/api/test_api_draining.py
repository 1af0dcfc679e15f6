"""Taking a host out of service."""

from datetime import timedelta
from typing import Any

import pytest
from api_world import Refused, World
from fastapi.testclient import TestClient

from shared.database import now
from shared.models import Server

DRAIN, RESUME = "/v1/hosts/kvm-1/drain", "/v1/hosts/kvm-1/resume"


def test_drain_and_resume(api: TestClient, world: World, server: Server) -> None:
    """Both answer with the host as it is then, and asking twice changes nothing."""
    for path, draining in ((DRAIN, True), (DRAIN, True), (RESUME, False), (RESUME, False)):
        response = api.post(path)
        assert (200, draining) == (response.status_code, response.json()["draining"])
        assert api.get("/v1/hosts/kvm-1").json() == response.json()
    told = [(each["type"], each["data"]) for each in api.get("/v1/events").json()["items"]]
    assert told == [
        ("triptych.host.resumed", {"host": "kvm-1"}),
        ("triptych.host.draining", {"host": "kvm-1"}),
    ]


@pytest.mark.parametrize("word", ["drain", "resume"])
def test_unknown_host(api: TestClient, refused: Refused, word: str) -> None:
    """There is nothing to drain or resume."""
    refused(api.post(f"/v1/hosts/nowhere/{word}"), 404, "host_not_found")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("servers/web-1/snapshot", {"replace": True}),
        ("servers/web-1/snapshot/revert", {}),
        ("servers/web-1/snapshot/promote", {}),
        ("servers/web-1/images", {}),
        ("images/first/restore", {}),
        ("images/first/verify", {}),
        ("servers/web-1/clones", {"name": "qa"}),
        ("servers/web-1/snapshot/clones", {"name": "qa"}),
        ("images/first/clones", {"name": "qa"}),
        ("servers", {"host": "kvm-1", "domain": "unregistered"}),
    ],
)
def test_new_work_is_refused_while_draining(
    api: TestClient, world: World, server: Server, refused: Refused, path: str, body: Any
) -> None:
    """It leaves nothing, says what to do, and after the resume it is accepted."""
    world.snapshot(server)
    world.image(server)
    world.domain("unregistered")
    api.post(DRAIN)

    problem = refused(api.post(f"/v1/{path}", json=body), 409, "host_draining")

    assert "`triptych host resume kvm-1`" in problem["detail"]
    assert (api.get("/v1/operations").json()["items"], api.get("/v1/clones").json()["items"]) == (
        [],
        [],
    )
    api.post(RESUME)
    assert api.post(f"/v1/{path}", json=body).status_code in (201, 202)


def test_other_hosts_go_on(api: TestClient, world: World, server: Server) -> None:
    """Only the servers of the host that drains are concerned."""
    world.host("kvm-2")
    world.server("elsewhere", host="kvm-2")
    api.post(DRAIN)
    assert api.post("/v1/servers/elsewhere/images").status_code == 202


def test_what_leaves_less_to_do_is_accepted_while_draining(
    api: TestClient, world: World, server: Server
) -> None:
    """Deleting, stopping, undoing, cancelling, and an answer that got lost asked for again."""
    world.snapshot(server)
    world.image(server)
    until = now() + timedelta(hours=1)
    done = world.operation(
        server, "snapshot.revert", state="succeeded", undo={"files": []}, undo_until=until
    )
    headers = {"Idempotency-Key": "once"}
    queued = api.post("/v1/servers/web-1/images", headers=headers).json()
    api.post(DRAIN)

    again = api.post("/v1/servers/web-1/images", headers=headers)

    assert (202, queued["id"]) == (again.status_code, again.json()["id"])
    assert api.post(f"/v1/operations/{queued['id']}/cancel").status_code == 200
    assert api.post(f"/v1/operations/{done.id}/undo").status_code == 202
    assert api.delete("/v1/servers/web-1/snapshot").status_code == 202
    assert api.delete("/v1/images/first").status_code == 202
    farm = world.farm(server, "qa-{n}")
    world.clone("qa-1", farm_id=farm.id, state="failed")
    assert api.post("/v1/farms/qa-{n}/stop").status_code == 202
    assert api.delete("/v1/clones/qa-1").status_code == 202
    assert api.delete("/v1/farms/qa-{n}").status_code == 202


def test_host_says_when_its_drain_is_over(api: TestClient, world: World, server: Server) -> None:
    """It counts what is queued and running there, and nothing else."""
    world.host("kvm-2")
    elsewhere = world.server("elsewhere", host="kvm-2")
    world.operation(server, state="running")
    for made in (server, server, elsewhere):
        world.operation(made)
    world.operation(server, state="succeeded")

    counted = {each["name"]: each["operations"] for each in api.get("/v1/hosts").json()["items"]}

    assert counted == {
        "kvm-1": {"queued": 2, "running": 1},
        "kvm-2": {"queued": 1, "running": 0},
    }
    assert api.post(DRAIN).json()["operations"] == {"queued": 2, "running": 1}
