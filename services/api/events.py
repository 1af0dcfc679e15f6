"""Events: facts that happened, as CloudEvents: a paged list, and a stream as they happen."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Field
from sqlalchemy import or_, select

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from shared import commands, errors, lookups
from shared.database import now, reading
from shared.events import as_cloudevent
from shared.models import Event

LOOK_EVERY = 0.25
"""Seconds between two looks for new events; each stream reads the database by itself."""
STREAMED_AT_ONCE = 200
PATIENCE, OPEN_FOR = 1.0, 600.0
"""Seconds that a number which is not there keeps those after it from being told, and that it is
looked for: PostgreSQL gives numbers out before the transactions end that took them, and some never
come. In order, so that who comes back goes on after the last one."""
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-Sent Events; each `data` is a CloudEvent, each `id` its id",
        "content": {"text/event-stream": {"example": examples.EVENT_STREAM}},
    }
}

router = APIRouter(prefix="/events", tags=["events"])


class EventsQuery(PageQuery):
    server: commands.Reference | None = Field(None, description="id or name")
    type: str | None = Field(
        None,
        max_length=100,
        pattern=r"^triptych\.[a-z._]+$",
        examples=["triptych.snapshot.taken"],
    )


@router.get(
    "",
    summary="List events",
    responses=examples.paged(examples.EVENT)
    | refusals(errors.ServerNotFound, errors.AmbiguousName),
)
def list_events(
    request: Request, response: Response, asked: Annotated[EventsQuery, Query()]
) -> Page[shapes.Event]:
    """What happened, newest first, if asked only to one server or of one type."""
    row: Any = Event
    query = select(Event)
    with reading() as session:
        if asked.server is not None:
            found = lookups.server(session, asked.server, forgotten=True)
            query = query.where(row.subject == found.id)
        if asked.type is not None:
            query = query.where(row.type == asked.type)
        rows, cursor = paging.fetch(session, query, row.seq, asked, newest_first=True)
    items = [shapes.Event.model_validate(as_cloudevent(each)) for each in rows]
    return paging.page(request, response, items, cursor)


@router.get(
    "/stream",
    summary="Follow events",
    response_class=EventSourceResponse,
    responses=STREAM | refusals(),
)
async def stream_events(
    request: Request,
    last_event_id: Annotated[
        str | None, Header(description="go on after this event; else from now on", max_length=64)
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Events as they happen, oldest first, each at least once; a comment keeps the line alive."""
    position = await run_in_threadpool(_position, last_event_id)
    if position.id:  # for who loses the connection before anything happens
        yield ServerSentEvent(id=position.id)
    stopping = request.app.state.stopping
    while not stopping.is_set():
        for event in await run_in_threadpool(_after, position):
            document = as_cloudevent(event)
            yield ServerSentEvent(data=document, id=event.id, event=event.type)
        await asyncio.sleep(LOOK_EVERY)


@dataclass
class _Position:
    """How far a stream has come."""

    seq: int = 0
    id: str | None = None
    """Of the event with that number."""
    open: dict[int, float] = field(default_factory=dict)
    """Lower numbers that were not there yet, and until when they are looked for."""
    waiting_since: float | None = None
    """For the next number, while there are higher ones."""

    def pass_by(self, seq: int) -> None:
        until = time.monotonic() + OPEN_FOR
        first = max(self.seq + 1, seq - STREAMED_AT_ONCE)
        self.open |= dict.fromkeys(range(first, seq), until)
        self.open.pop(seq, None)
        self.seq = max(self.seq, seq)
        self.waiting_since = None

    def has_to_wait(self, event: Event) -> bool:
        """Whether one may come that is to be told before that event."""
        if (event.seq or 0) <= self.seq + 1 or event.time < now() - timedelta(seconds=OPEN_FOR):
            return False
        self.waiting_since = self.waiting_since or time.monotonic()
        return time.monotonic() < self.waiting_since + PATIENCE


def _position(last_event_id: str | None) -> _Position:
    """To go on after the named event, or after the newest one."""
    row: Any = Event
    newest = select(Event).order_by(row.seq.desc()).limit(1)
    with reading() as session:
        named = select(Event).where(row.id == last_event_id)
        found = session.scalars(named).first() or session.scalars(newest).first()
        if found is None:
            return _Position()
        position = _Position(max(0, (found.seq or 0) - STREAMED_AT_ONCE), found.id)
        there = select(row.seq).where(row.seq > position.seq, row.seq <= found.seq)
        for seq in session.scalars(there.order_by(row.seq)):
            position.pass_by(seq)
        return position


def _after(position: _Position) -> list[Event]:
    row: Any = Event
    position.open = {seq: end for seq, end in position.open.items() if end > time.monotonic()}
    with reading() as session:
        new = or_(row.seq > position.seq, row.seq.in_(list(position.open)))
        query = select(Event).where(new).order_by(row.seq)
        found = list(session.scalars(query.limit(STREAMED_AT_ONCE)))
    told = []
    for event in found:
        if position.has_to_wait(event):
            break
        position.pass_by(event.seq or 0)
        told.append(event)
    return told
