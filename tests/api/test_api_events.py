"""Events over HTTP: the list, and the stream from a real server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

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


def _numbers(lines: Iterator[str], last: int) -> list[object]:
    """Those that are told, up to this one."""
    told: list[object] = []
    while last not in told:
        ((_, event),) = _read(lines, 1)
        data: Any = event["data"]
        told.append(data["number"])
    return told


def _opened(lines: Iterator[str]) -> str:
    """The id that a stream opens with."""
    name, _, value = next(lines).partition(": ")
    assert name == "id"
    return value


def test_a_stream_tells_what_happens_from_now_on(live: httpx.Client) -> None:
    """What happened before the connection is not told; what happens after is, in order."""
    _happen(0)
    with live.stream("GET", "/events/stream") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        _opened(lines)
        _happen(1)
        _happen(2)
        told = _read(lines, 2)

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


def test_a_stream_that_breaks_before_anything_happened(live: httpx.Client) -> None:
    """It opens with an id to go on after, the newest one's or the one that was sent."""
    _happen(0)
    newest = live.get("/events").json()["items"][0]["id"]
    with live.stream("GET", "/events/stream") as response:
        opened = _opened(response.iter_lines())
    assert opened == newest

    _happen(1)
    for _ in range(2):
        with live.stream("GET", "/events/stream", headers={"Last-Event-ID": opened}) as response:
            lines = response.iter_lines()
            assert _opened(lines) == opened
            assert _numbers(lines, 1) == [1]


@pytest.mark.parametrize("any_database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
def test_an_event_that_is_committed_after_a_later_one_is_told(
    live: httpx.Client, any_database: str, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Its transaction took a number, and ended after that of a higher one. It is told before that
    one if it is waited for so long: who comes back goes on after both. Else when it is there."""
    monkeypatch.setattr(stream, "PATIENCE", 0.1 if late else 60)
    _happen(0)
    with ExitStack() as transactions:

        def take(number: int) -> ExitStack:
            open_ = transactions.enter_context(ExitStack())
            session = open_.enter_context(transaction())
            events.emit(session, "test.happened", None, number=number)
            session.flush()
            return open_

        before = take(1)
        _happen(2)
        with live.stream("GET", "/events/stream") as response:
            lines = response.iter_lines()
            _opened(lines)
            meanwhile = take(3)
            _happen(4)
            if late:
                assert _numbers(lines, 4) == [4]
            before.close()
            if not late:
                assert _numbers(lines, 1) == [1]
            meanwhile.close()
            _happen(5)
            assert _numbers(lines, 5) == ([1, 3, 5] if late else [3, 4, 5])
            _happen(6)
            assert _numbers(lines, 6) == [6]
