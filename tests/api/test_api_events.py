"""Events over HTTP: the list, and the stream from a real server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from api_world import TOKEN
from fastapi import FastAPI

from services.api import events as stream
from shared import events
from shared.database import transaction


@pytest.fixture
def live(app: FastAPI) -> Iterator[httpx.Client]:
    """The API behind a real socket: a stream needs one."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield httpx.Client(
        base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1",
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=60,
    )
    app.state.stopping.set()
    server.should_exit = True
    thread.join(60)
    app.state.stopping.clear()  # the application is shared by all tests
    assert not thread.is_alive(), "the stream kept the API from stopping"


def _happen(number: int) -> None:
    with transaction() as session:
        events.emit(session, "test.happened", None, number=number)


def _read(lines: Iterator[str], count: int) -> list[tuple[str, dict[str, object]]]:
    found: list[tuple[str, dict[str, object]]] = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line:
            fields[name] = value.strip()
        elif "data" in fields:
            found.append((fields["id"], json.loads(fields["data"])))
            fields = {}
            if len(found) == count:
                return found
    raise AssertionError(f"the stream ended after {len(found)} events")


def test_the_list_shows_the_newest_first(live: httpx.Client) -> None:
    """Somebody who looks wants to know what happened last."""
    for number in range(3):
        _happen(number)

    items = live.get("/events", params={"type": "triptych.test.happened"}).json()["items"]

    assert [item["data"]["number"] for item in items] == [2, 1, 0]


def test_a_stream_tells_what_happens_from_now_on(
    live: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened before the connection is not told; what happens after is, in order."""
    begun = threading.Event()
    look = stream._position

    def position(last_event_id: str | None) -> int:
        found = look(last_event_id)
        begun.set()
        return found

    def happen() -> None:
        assert begun.wait(60)
        _happen(1)
        _happen(2)

    monkeypatch.setattr(stream, "_position", position)
    _happen(0)
    later = threading.Thread(target=happen)
    with live.stream("GET", "/events/stream") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        later.start()
        told = _read(response.iter_lines(), 2)
    later.join()

    assert [event["data"]["number"] for _, event in told] == [1, 2]
    assert [id_ for id_, _ in told] == [event["id"] for _, event in told]


def test_a_stream_goes_on_after_the_last_event_seen(live: httpx.Client) -> None:
    """`Last-Event-ID` loses nothing and repeats nothing."""
    for number in range(3):
        _happen(number)
    first = live.get("/events", params={"type": "triptych.test.happened"}).json()["items"][-1]
    with live.stream("GET", "/events/stream", headers={"Last-Event-ID": first["id"]}) as response:
        told = _read(response.iter_lines(), 2)

    assert [event["data"]["number"] for _, event in told] == [1, 2]
