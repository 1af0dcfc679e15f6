"""Events: facts that happened, as CloudEvents: a paged list, and a stream as they happen."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Field
from sqlalchemy import func, select

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from shared import commands, errors, lookups
from shared.database import reading
from shared.events import as_cloudevent
from shared.models import Event

LOOK_EVERY = 0.25
"""Seconds between two looks for new events; each stream reads the database by itself."""
STREAMED_AT_ONCE = 200
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
    stopping = request.app.state.stopping
    while not stopping.is_set():
        for event in await run_in_threadpool(_after, position):
            position = event.seq or position
            document = as_cloudevent(event)
            yield ServerSentEvent(data=document, id=event.id, event=event.type)
        await asyncio.sleep(LOOK_EVERY)


def _position(last_event_id: str | None) -> int:
    """The number to go on after: the named event's, or the newest one's."""
    row: Any = Event
    with reading() as session:
        if last_event_id:
            named = session.scalar(select(row.seq).where(row.id == last_event_id))
            if named is not None:
                return int(named)
        return session.scalar(select(func.max(row.seq))) or 0


def _after(position: int) -> list[Event]:
    row: Any = Event
    with reading() as session:
        query = select(Event).where(row.seq > position).order_by(row.seq)
        return list(session.scalars(query.limit(STREAMED_AT_ONCE)))
