"""Following, cancelling and undoing operations."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from api_world import Refused, World
from fastapi.testclient import TestClient

from services.api.app import create_app
from shared.database import now, transaction
from shared.models import Operation, Server
from shared.operations.finish import finish


def end(operation: Operation, state: str = "succeeded") -> None:
    with transaction() as session:
        current = session.get_one(Operation, operation.seq)
        current.result = {"image": "img_1"}
        finish(session, current, state)


def test_show(api: TestClient, world: World, server: Server) -> None:
    """An operation has exactly the promised fields."""
    operation = world.operation(server, state="running", phase="copying", progress=42)
    found = api.get(f"/v1/operations/{operation.id}").json()
    assert set(found) == {
        *("id", "kind", "server", "host", "state", "phase", "progress", "bytes_done"),
        *("bytes_total", "created_at", "started_at", "finished_at", "requested_by", "attempt"),
        *("waiting", "error", "result", "undo_until"),
    }
    assert (server.id, "running", "copying", 42) == (
        found["server"],
        found["state"],
        found["phase"],
        found["progress"],
    )


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("POST", "/cancel"), ("POST", "/undo"), ("GET", "?wait=60")]
)
def test_unknown_operation(api: TestClient, refused: Refused, method: str, path: str) -> None:
    """An unknown operation is refused at once, also by those who wait."""
    began = time.monotonic()
    refused(api.request(method, f"/v1/operations/op_x{path}"), 404, "operation_not_found")
    assert time.monotonic() - began < 30


def test_list(api: TestClient, world: World, server: Server, refused: Refused) -> None:
    """Operations are listed newest first, and by state, server and kind."""
    other = world.server("web-2")
    first = world.operation(server, state="failed")
    second = world.operation(other, "clone.create")
    third = world.operation(server, "snapshot.take")

    def ids(**query: Any) -> list[str]:
        return [each["id"] for each in api.get("/v1/operations", params=query).json()["items"]]

    assert [third.id, second.id, first.id] == ids()
    assert [third.id, first.id] == ids(server="web-1")
    assert [first.id] == ids(state="failed")
    assert [second.id] == ids(kind="clone.create")
    assert [third.id] == ids(kind="snapshot.take", state="queued", server=server.id)
    assert ids(kind="no.such") == []
    refused(api.get("/v1/operations", params={"state": "done"}), 422, "invalid_request")
    refused(api.get("/v1/operations", params={"server": "nobody"}), 404, "server_not_found")


def test_pages_newest_first(api: TestClient, world: World, server: Server) -> None:
    """Pages keep the filter and do not shift when a new operation comes."""
    made = [world.operation(server).id for _ in range(3)]
    world.operation(world.server("web-2"))
    first = api.get("/v1/operations", params={"limit": 2, "server": "web-1"})
    world.operation(server)
    second = api.get(first.headers["link"].split(">")[0].removeprefix("<")).json()
    items = first.json()["items"] + second["items"]
    assert made[::-1] == [each["id"] for each in items]


def test_wait_answers_when_it_ends(api: TestClient, world: World, server: Server) -> None:
    """Waiting for 60 s answers within a fraction of a second of the end, of three times once at
    least: the machine may be busy with something else."""
    late: list[float] = []
    for _ in range(3):
        operation = world.operation(server, state="running")
        ended: list[float] = []

        def work(operation: Operation = operation, ended: list[float] = ended) -> None:
            time.sleep(0.5)
            end(operation)
            ended.append(time.monotonic())

        thread = threading.Thread(target=work)
        thread.start()
        found = api.get(f"/v1/operations/{operation.id}", params={"wait": 60}).json()
        answered = time.monotonic()
        thread.join()
        late.append(answered - ended[0])
        assert (
            found["state"],
            found["result"],
            found["progress"],
        ) == ("succeeded", {"image": "img_1"}, 100)
    assert min(late) < 0.5


def test_wait_gives_up_in_time(api: TestClient, world: World, server: Server) -> None:
    """An operation that does not end is shown as it is after the seconds asked for."""
    operation = world.operation(server, state="running")
    began = time.monotonic()
    found = api.get(f"/v1/operations/{operation.id}", params={"wait": 0.4}).json()
    assert found["state"] == "running"
    assert 0.4 <= time.monotonic() - began < 30


def test_waiting_holds_no_thread(api: TestClient, world: World, server: Server) -> None:
    """More callers wait than the API has threads, and others are answered meanwhile."""
    api = TestClient(create_app(), headers=api.headers)
    operation = world.operation(server, state="running")
    path = f"/v1/operations/{operation.id}"
    with api:  # one event loop for all
        waiting = [
            threading.Thread(target=api.get, args=(path,), kwargs={"params": {"wait": 60}})
            for _ in range(60)
        ]
        for each in waiting:
            each.start()
        time.sleep(0.5)
        began = time.monotonic()
        assert api.get("/v1/servers").status_code == 200
        end(operation)
        for each in waiting:
            each.join()
        assert time.monotonic() - began < 30


def test_waiting_ends_with_the_api(api: TestClient, world: World, server: Server) -> None:
    """An API that is told to stop answers those who wait with how things stand."""
    operation = world.operation(server, state="running")
    app = create_app()
    threading.Timer(0.3, app.state.stopping.set).start()
    began = time.monotonic()
    path = f"/v1/operations/{operation.id}?wait=30"
    response = TestClient(app, headers=api.headers).get(path)
    assert (response.status_code, response.json()["state"]) == (200, "running")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("wait", [-1, 61, "long", "nan", "inf"])
def test_bad_wait(
    api: TestClient, world: World, server: Server, refused: Refused, wait: Any
) -> None:
    """Waiting takes 0 to 60 seconds."""
    operation = world.operation(server)
    response = api.get(f"/v1/operations/{operation.id}", params={"wait": wait})
    assert refused(response, 422, "invalid_request")["errors"][0]["field"] == "wait"


def test_cancel_queued(api: TestClient, server: Server) -> None:
    """What is queued is cancelled on the spot; asking again changes nothing."""
    queued = api.post("/v1/servers/web-1/images").json()
    response = api.post(f"/v1/operations/{queued['id']}/cancel")
    cancelled = response.json()
    assert (response.status_code, cancelled["state"]) == (200, "cancelled")
    assert cancelled["error"]["code"] == "cancelled"
    again = api.post(f"/v1/operations/{queued['id']}/cancel")
    assert (200, cancelled) == (again.status_code, again.json())


def test_cancel_frees_clone_names(api: TestClient, server: Server) -> None:
    """A cancelled farm's names can be used again."""
    first = api.post("/v1/servers/web-1/clones", json={"name": "qa"}).json()
    api.post(f"/v1/operations/{first['id']}/cancel")
    assert api.get("/v1/clones").json()["items"][0]["state"] == "cancelled"
    assert api.post("/v1/servers/web-1/clones", json={"name": "qa"}).status_code == 202


def test_cancel_running(api: TestClient, world: World, server: Server) -> None:
    """What runs is told to stop: 202, and its worker sees the request."""
    operation = world.operation(server, state="running")
    response = api.post(f"/v1/operations/{operation.id}/cancel")
    assert (response.status_code, response.json()["state"]) == (202, "running")
    with transaction() as session:
        assert session.get_one(Operation, operation.seq).cancel_requested_at


@pytest.mark.parametrize(
    "fields", [{"state": "succeeded"}, {"state": "running", "committed": True}]
)
def test_cancel_too_late(
    api: TestClient, world: World, server: Server, refused: Refused, fields: dict[str, Any]
) -> None:
    """Past the point of no return nothing is cancelled."""
    operation = world.operation(server, **fields)
    response = api.post(f"/v1/operations/{operation.id}/cancel")
    assert operation.id == refused(response, 409, "not_cancellable")["operation"]


@pytest.mark.parametrize("kind", ["snapshot.revert", "image.restore"])
def test_undo(api: TestClient, world: World, server: Server, kind: str) -> None:
    """E1: a revert or restore within its time is undone by a new operation."""
    until = now() + timedelta(hours=1)
    done = world.operation(server, kind, state="succeeded", undo={"files": []}, undo_until=until)
    assert api.get(f"/v1/operations/{done.id}").json()["undo_until"]
    response = api.post(f"/v1/operations/{done.id}/undo")
    made = response.json()
    assert (202, f"{kind}.undo", server.id) == (
        response.status_code,
        made["kind"],
        made["server"],
    )
    assert f"/v1/operations/{made['id']}" == response.headers["location"]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("image.create", {"state": "succeeded"}),
        ("snapshot.revert", {"state": "failed"}),
        (
            "snapshot.revert",
            {"state": "succeeded", "undo": {}, "undo_until": now() - timedelta(seconds=1)},
        ),
        ("image.restore", {"state": "succeeded", "undo": None, "undo_until": now()}),
    ],
)
def test_not_undoable(
    api: TestClient,
    world: World,
    server: Server,
    refused: Refused,
    kind: str,
    fields: dict[str, Any],
) -> None:
    """What replaced nothing, failed, is undone already or too old cannot be undone."""
    operation = world.operation(server, kind, **fields)
    refused(api.post(f"/v1/operations/{operation.id}/undo"), 409, "not_undoable")


def test_undone_operation_no_longer_offers_it(
    api: TestClient, world: World, server: Server
) -> None:
    """`undo_until` is null where there is nothing left to put back."""
    done = world.operation(server, "snapshot.revert", state="succeeded", undo_until=now())
    assert api.get(f"/v1/operations/{done.id}").json()["undo_until"] is None


def test_a_failure_says_why(api: TestClient, world: World, server: Server) -> None:
    """`error` is a code and a sentence."""
    error = {"code": "worker_lost", "message": "The worker died."}
    failed = world.operation(server, state="failed", error=error)
    assert error == api.get(f"/v1/operations/{failed.id}").json()["error"]
