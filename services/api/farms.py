"""Farms: the clones that were made by one request, looked at, started, stopped and ended as one."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import ConfigDict, Field
from sqlalchemy import and_, func, select
from sqlmodel import Session

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from services.api.work import (
    Empty,
    IdempotencyKey,
    NameOrId,
    RequestBody,
    accepted,
    settled,
    start,
)
from shared import commands, errors, events, farms, lookups
from shared.database import now, reading
from shared.models import Clone, Domain, Farm, Operation, Server

router = APIRouter(prefix="/farms", tags=["farms"])

ABOUT = (errors.FarmNotFound, errors.AmbiguousName)


class Stopping(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"timeout_s": 120}]})

    timeout_s: int = Field(120, ge=1, le=3600, description="how long each guest may take")
    force: bool = Field(False, description="cut the power of those that are still on then")


class Extension(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"expires_in_h": 8}]})

    expires_in_h: commands.Lifetime | None = Field(
        description="from now; null: it lives until it is deleted"
    )


def _shown(session: Session, rows: list[Farm]) -> list[shapes.Farm]:
    """The farms with what their clones are and what their VMs do, in one more query."""
    clone: Any = Clone
    server: Any = Server
    domain: Any = Domain
    query = (
        select(clone.farm_id, clone.state, clone.server_id, domain.state, func.count())
        .outerjoin(Server, server.id == clone.server_id)
        .outerjoin(Domain, and_(domain.host == server.host, domain.uuid == server.domain_uuid))
        .where(clone.farm_id.in_([each.id for each in rows]), clone.state != "deleted")
        .group_by(clone.farm_id, clone.state, clone.server_id, domain.state)
    )
    clones: dict[str, dict[str, int]] = {each.id: {} for each in rows}
    power: dict[str, dict[str, int]] = {each.id: {} for each in rows}
    for farm_id, state, server_id, now_it_is, count in session.execute(query):
        clones[farm_id][state] = clones[farm_id].get(state, 0) + count
        if state == "ready" and server_id:
            known = now_it_is or "missing"
            power[farm_id][known] = power[farm_id].get(known, 0) + count
    return [shapes.Farm.of(each, clones[each.id], power[each.id]) for each in rows]


@router.get("", summary="List farms", responses=examples.paged(examples.FARM) | refusals())
def list_farms(
    request: Request, response: Response, asked: Annotated[PageQuery, Query()]
) -> Page[shapes.Farm]:
    """Every farm that is not deleted, newest first. A single clone is a farm of one."""
    row: Any = Farm
    with reading() as session:
        query = select(Farm).where(row.deleted_at.is_(None))
        rows, cursor = paging.fetch(session, query, row.id, asked, newest_first=True)
        items = _shown(session, rows)
    return paging.page(request, response, items, cursor)


@router.get(
    "/{farm}",
    summary="Show a farm",
    responses=examples.shown(examples.FARM_WITH_CLONES) | refusals(*ABOUT),
)
def show(farm: NameOrId) -> shapes.FarmWithClones:
    """The farm, what its clones were made from, when it ends, and each clone."""
    row: Any = Clone
    with reading() as session:
        found = lookups.farm(session, farm)
        query = select(Clone).where(row.farm_id == found.id, row.state != "deleted")
        items = [shapes.Clone.of(each) for each in session.scalars(query.order_by(row.name))]
        (shown,) = _shown(session, [found])
    return shapes.FarmWithClones(**shown.model_dump(), items=items)


@router.patch(
    "/{farm}",
    summary="Set, extend or remove a farm's end",
    responses=examples.shown(examples.FARM) | refusals(*ABOUT, errors.ServerBusy),
)
def change(request: Request, farm: NameOrId, body: Extension) -> shapes.Farm:
    """The farm is deleted so many hours from now; with null it is not, until somebody does.

    Before it is made, the hours count from when it is. Refused while its deletion is running.
    """
    changed = settled(lambda session: _change(session, farm, body.expires_in_h))
    request.app.state.relay.kick()
    return changed


def _change(session: Session, reference: str, hours: float | None) -> shapes.Farm:
    row: Any = Operation
    farm = lookups.held_farm(session, reference)
    running = select(Operation).where(
        row.server_id == farm.server_id,
        row.state == "running",
        row.kind == commands.DeleteFarm.kind,
    )
    for each in session.scalars(running):
        if each.command["farm"] == farm.id:
            raise errors.ServerBusy(
                f"Farm {farm.name!r} is being deleted by operation {each.id}. Nothing was "
                "changed; cancel that if it is not too late, then ask again.",
                operation=each.id,
            )
    if _is_made(session, farm):
        farms.let_end(farm, hours, now())
    else:
        farm.expires_in_h = hours
        farm.expires_at = farm.due_at = farm.warned_at = None  # of clones that were deleted
    session.add(farm)
    ends = farm.expires_at.isoformat() if farm.expires_at else None
    told = {"farm": farm.id, "name": farm.name, "expires_at": ends}
    events.emit(session, "farm.changed", farm.server_id, **told)
    session.flush()
    return _shown(session, [farm])[0]


def _is_made(session: Session, farm: Farm) -> bool:
    """Whether any of its clones was."""
    row: Any = Clone
    ready = select(row.id).where(row.farm_id == farm.id, row.state == "ready")
    return session.scalars(ready.limit(1)).first() is not None


@router.post(
    "/{farm}/start",
    status_code=202,
    summary="Start a farm",
    responses=accepted(*ABOUT, errors.HostDraining),
)
def start_farm(
    request: Request, response: Response, farm: NameOrId, body: Empty, key: IdempotencyKey = None
) -> shapes.Operation:
    """Starts the clones that are off; each has its own outcome in the operation's result."""
    return start(request, response, commands.StartFarm, key, farm=farm)


@router.post("/{farm}/stop", status_code=202, summary="Stop a farm", responses=accepted(*ABOUT))
def stop_farm(
    request: Request,
    response: Response,
    farm: NameOrId,
    body: Stopping = Body(default_factory=Stopping),
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Has all guests shut down, by their agent or ACPI, and waits for them.

    One that is still on after `timeout_s` is left on and named, or with `force: true` its power
    is cut.
    """
    return start(request, response, commands.StopFarm, key, farm=farm, **body.model_dump())


@router.post(
    "/{farm}/retry",
    status_code=202,
    summary="Make the clones of a farm that failed again",
    responses=accepted(
        *ABOUT,
        errors.NothingToRetry,
        errors.FarmSourceGone,
        errors.CloneNameTaken,
        errors.HostDraining,
    ),
)
def retry(
    request: Request, response: Response, farm: NameOrId, body: Empty, key: IdempotencyKey = None
) -> shapes.Operation:
    """Only those, with the same names, from the same source.

    A server is copied anew for it: the result's `taken_at` is that copy's instant, which is not
    that of the clones there are. Refused where none failed, and where the source is gone.
    """
    return start(request, response, commands.RetryFarm, key, farm=farm)


@router.delete("/{farm}", status_code=202, summary="Delete a farm", responses=accepted(*ABOUT))
def delete(
    request: Request, response: Response, farm: NameOrId, key: IdempotencyKey = None
) -> shapes.Operation:
    """Stops and removes its VMs, the files that were made for them, and their snapshots.

    Their images stay, and so do disks that a VM was given later or that another one needs: the
    result names them. A clone with work of its own queued or running is left, and named.
    """
    return start(request, response, commands.DeleteFarm, key, farm=farm)
