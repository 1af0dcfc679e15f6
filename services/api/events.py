"""Events: facts that happened, as CloudEvents, oldest first."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from sqlalchemy import select

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from shared import commands, errors, lookups
from shared.database import reading
from shared.events import as_cloudevent
from shared.models import Event

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
    """What happened, oldest first, if asked only to one server or of one type."""
    row: Any = Event
    query = select(Event)
    with reading() as session:
        if asked.server is not None:
            found = lookups.server(session, asked.server, forgotten=True)
            query = query.where(row.subject == found.id)
        if asked.type is not None:
            query = query.where(row.type == asked.type)
        rows, cursor = paging.fetch(session, query, row.seq, asked)
    items = [shapes.Event.model_validate(as_cloudevent(each)) for each in rows]
    return paging.page(request, response, items, cursor)
