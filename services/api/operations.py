"""Operations: what every piece of long work is followed, cancelled and undone by."""

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from sqlalchemy import select

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from services.api.waiting import shown
from services.api.work import Empty, IdempotencyKey, NameOrId, accepted, settled, start
from shared import commands, errors, lookups
from shared.commands import Command
from shared.database import reading
from shared.models import Operation
from shared.operations.cancel import cancel as cancel_operation

router = APIRouter(prefix="/operations", tags=["operations"])

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")
UNDOES: dict[str, type[Command]] = {
    commands.RevertSnapshot.kind: commands.UndoRevert,
    commands.RestoreImage.kind: commands.UndoRestore,
}
FIRST_STEP, LAST_STEP = 0.005, 0.05
"""Seconds between two looks at the row while a caller waits: PART of what it has waited."""
PART = 1 / 60


class OperationsQuery(PageQuery):
    state: State | None = None
    server: commands.Reference | None = Field(None, description="id or name")
    kind: str | None = Field(None, max_length=64, pattern=r"^[a-z.]+$", examples=["image.create"])


@router.get(
    "",
    summary="List operations",
    responses=examples.paged(examples.DONE) | refusals(errors.ServerNotFound, errors.AmbiguousName),
)
def list_operations(
    request: Request, response: Response, asked: Annotated[OperationsQuery, Query()]
) -> Page[shapes.Operation]:
    """All operations, newest first, if asked those of one state, server or kind."""
    row: Any = Operation
    query = select(Operation)
    with reading() as session:
        if asked.server is not None:
            found = lookups.server(session, asked.server, forgotten=True)
            query = query.where(row.server_id == found.id)
        if asked.state is not None:
            query = query.where(row.state == asked.state)
        if asked.kind is not None:
            query = query.where(row.kind == asked.kind)
        rows, cursor = paging.fetch(session, query, row.seq, asked, newest_first=True)
        items = shown(session, rows)
    return paging.page(request, response, items, cursor)


def _look(operation: str) -> Operation:
    with reading() as session:
        return lookups.operation(session, operation)


def _shown(operation: str) -> shapes.Operation:
    with reading() as session:
        return shown(session, [lookups.operation(session, operation)])[0]


def _ended(operation: str) -> shapes.Operation | None:
    """None until it has; a caller waits for every step between its end and the answer, and whoever
    has just asked for it waits for its wake-up to be sent, beside which this is done."""
    row: Any = Operation
    with reading() as session:
        state = session.scalar(select(row.state).where(row.id == operation))
        if state is not None and state not in ENDED:
            return None
        return shown(session, [lookups.operation(session, operation)])[0]


@router.get(
    "/{operation}",
    summary="Show an operation, or wait for its end",
    responses=examples.shown(examples.DONE) | refusals(errors.OperationNotFound),
)
async def show(
    request: Request,
    operation: NameOrId,
    wait: Annotated[
        float, Query(ge=0, le=60, allow_inf_nan=False, description="seconds to wait for its end")
    ] = 0,
) -> shapes.Operation:
    """The operation now; with `wait` as soon as it ends, or after that many seconds."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < wait:
        if ended := await run_in_threadpool(_ended, operation):
            return ended
        if request.app.state.stopping.is_set() or await request.is_disconnected():
            break
        step = min(max(FIRST_STEP, waited * PART), LAST_STEP)
        await asyncio.sleep(min(step, wait - waited))
    return await run_in_threadpool(_shown, operation)


CANCELLED: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "It is running and was told to stop; it does within 5 s",
        "content": {"application/json": {"example": examples.RUNNING}},
    },
    200: {
        "description": "It had not begun, or is cancelled already",
        "model": shapes.Operation,
        "content": {"application/json": {"example": examples.CANCELLED}},
    },
}


@router.post(
    "/{operation}/cancel",
    status_code=202,
    summary="Cancel an operation",
    responses=CANCELLED | refusals(errors.OperationNotFound, errors.NotCancellable),
)
def cancel(
    request: Request, response: Response, operation: NameOrId, body: Empty
) -> shapes.Operation:
    """Ends the work, leaves the server as it was and no files; asking twice does no harm."""
    found = settled(lambda session: shown(session, [cancel_operation(session, operation)])[0])
    request.app.state.relay.kick()
    response.headers["Location"] = f"/v1/operations/{found.id}"
    if found.state in ENDED:
        response.status_code = 200
    return found


@router.post(
    "/{operation}/undo",
    status_code=202,
    summary="Undo a revert or a restore",
    responses=accepted(errors.OperationNotFound, errors.NotUndoable),
)
def undo(
    request: Request,
    response: Response,
    operation: NameOrId,
    body: Empty,
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Puts back what the revert or restore replaced; possible until its `undo_until`.

    The answer is a new operation.
    """
    found = _look(operation)
    if found.kind not in UNDOES:
        raise errors.NotUndoable(
            f"Operation {found.id} is {found.kind}, which replaces nothing. Only a revert "
            "(snapshot.revert) and a restore (image.restore) can be undone.",
            operation=found.id,
        )
    return start(request, response, UNDOES[found.kind], key, operation=found.id)
