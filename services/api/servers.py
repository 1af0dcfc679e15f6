"""Servers: libvirt domains that are registered. Registering copies nothing."""

import asyncio
import time
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ConfigDict, Field
from sqlalchemy import func, or_, select, tuple_
from sqlmodel import Session

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from services.api.protection import unprotected
from services.api.work import NameOrId, RequestBody, settled
from shared import errors, events, farms, forgetting, lookups
from shared.database import now, reading
from shared.models import Clone, Domain, Farm, Image, Operation, Server, Snapshot
from shared.operations.drain import refuse_new_work

router = APIRouter(tags=["servers"])

INVENTORY_LAG = 3.0
"""Seconds to wait for a domain that was defined a moment ago to be reported."""


class Registration(RequestBody):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"host": "kvm-1", "domain": "web-1"}]}
    )

    host: str = Field(min_length=1, max_length=63)
    domain: str = Field(min_length=1, max_length=255, description="libvirt name or UUID")


class ServersQuery(PageQuery):
    unprotected: bool | None = Field(
        None, description="true: only those without an image as new as their schedules promise"
    )


def shown(session: Session, rows: list[Server]) -> list[shapes.Server]:
    """The servers with their live state, three queries however many there are."""
    row: Any = Domain
    snapshot: Any = Snapshot
    image: Any = Image
    ids = [each.id for each in rows]
    places = [(each.host, each.domain_uuid) for each in rows]
    domains = {
        (each.host, each.uuid): each
        for each in session.scalars(select(Domain).where(tuple_(row.host, row.uuid).in_(places)))
    }
    snapshots: dict[str, str] = {}
    newest: dict[str, str] = {}
    for server_id, found in session.execute(
        select(snapshot.server_id, snapshot.id).where(
            snapshot.server_id.in_(ids), snapshot.deleted_at.is_(None)
        )
    ):
        snapshots[server_id] = found
    for server_id, found in session.execute(
        select(image.server_id, func.max(image.id))  # ids sort by the time they were made
        .where(image.server_id.in_(ids), image.deleted_at.is_(None), image.state == "complete")
        .group_by(image.server_id)
    ):
        newest[server_id] = found
    return [
        shapes.Server.of(
            each,
            domains.get((each.host, each.domain_uuid)),
            snapshots.get(each.id),
            newest.get(each.id),
        )
        for each in rows
    ]


@router.post(
    "/servers",
    status_code=201,
    summary="Register a server",
    responses=examples.shown(examples.SERVER, 201)
    | refusals(
        errors.HostNotFound,
        errors.DomainNotFound,
        errors.ServerExists,
        errors.ServerBusy,
        errors.HostDraining,
        errors.DomainWithoutDisks,
        errors.HostNotAnswering,
    ),
)
async def register(body: Registration, response: Response) -> shapes.Server:
    """Registers a libvirt domain, by name or UUID. The domain is not touched.

    One that was registered before gets its old id, and with it its images.
    """
    patience = time.monotonic() + INVENTORY_LAG
    while not (known := await run_in_threadpool(_known, body)):
        if time.monotonic() > patience:
            raise errors.DomainNotFound(
                f"Host {body.host!r} has no libvirt domain {body.domain!r}. Nothing was changed; "
                f"`triptych host domains {body.host}` and `virsh list --all` show those it has."
            )
        await asyncio.sleep(0.1)
    made = await run_in_threadpool(settled, lambda session: _register(session, body, known))
    response.headers["Location"] = f"/v1/servers/{made.id}"
    return made


def _known(body: Registration) -> str | None:
    """The UUID of the domain, if the host has reported it."""
    row: Any = Domain
    try:
        uuid = str(UUID(body.domain))
    except ValueError:
        uuid = body.domain
    with reading() as session:
        host = lookups.host(session, body.host)
        query = select(row.uuid).where(
            row.host == host.name, or_(row.name == body.domain, row.uuid == uuid)
        )
        found: str | None = session.scalars(query.order_by(row.name != body.domain)).first()
        if found is None and not host.answering:
            raise errors.HostNotAnswering(
                f"Host {host.name!r} does not answer, so its domains cannot be looked up: "
                f"{host.problem or 'its workers have not reported for more than 90 seconds'}. "
                "Nothing was changed; see to the host's workers, then ask again."
            )
        return found


def _register(session: Session, body: Registration, uuid: str) -> shapes.Server:
    row: Any = Server
    domain = session.get(Domain, (body.host, uuid))
    if domain is None:
        raise errors.DomainNotFound(f"Domain {body.domain!r} has just been undefined.")
    _refuse_half_made(session, domain)
    query = select(Server).where(row.host == body.host, row.domain_uuid == uuid)
    earlier = session.scalars(query.order_by(row.forgotten_at.is_not(None), row.id.desc())).first()
    if earlier and not earlier.forgotten_at:
        raise errors.ServerExists(
            f"Domain {domain.name!r} on host {body.host!r} is registered as server "
            f"{earlier.name!r} ({earlier.id}). Nothing was changed; use that one.",
            conflict=earlier.id,
        )
    if not any(disk.get("writable", True) for disk in domain.disks):
        raise errors.DomainWithoutDisks(
            f"Domain {domain.name!r} has no writable disk, so there is nothing that a snapshot, "
            "an image or a clone could hold. Attach a disk, then register it."
        )
    refuse_new_work(session, body.host)
    server = earlier or Server(name=domain.name, host=body.host, domain_uuid=uuid)
    server.name, server.forgotten_at = domain.name, None
    session.add(server)
    session.flush()
    events.emit(session, "server.registered", server.id, name=server.name, host=server.host)
    return shown(session, [server])[0]


def _refuse_half_made(session: Session, domain: Domain) -> None:
    row: Any = Clone
    query = select(Clone).where(
        row.host == domain.host, row.name == domain.name, row.state.in_(("queued", "making"))
    )
    if clone := session.scalars(query).first():
        raise errors.ServerBusy(
            f"Domain {domain.name!r} is a clone in the making, which is registered by itself when "
            f"operation {clone.operation_id} is done.",
            operation=clone.operation_id,
        )


@router.get(
    "/servers", summary="List servers", responses=examples.paged(examples.SERVER) | refusals()
)
def list_servers(
    request: Request, response: Response, asked: Annotated[ServersQuery, Query()]
) -> Page[shapes.Server]:
    """The registered servers, oldest registration first, each with its live state.

    `unprotected=true` lists those that have an enabled schedule and no good image which is newer
    than that schedule's period, its catch-up window and two hours together. Good is any whole
    image of the server; where the schedule requires it, a verified one. A schedule that was just
    set has that long to keep its promise. `false` lists the others, also those without a schedule.
    """
    row: Any = Server
    with reading() as session:
        query = select(Server).where(row.forgotten_at.is_(None))
        if asked.unprotected is not None:
            lacking = unprotected(now())
            query = query.where(lacking if asked.unprotected else ~lacking)
        rows, cursor = paging.fetch(session, query, row.id, asked)
        items = shown(session, rows)
    return paging.page(request, response, items, cursor)


@router.get(
    "/servers/{server}",
    summary="Show a server",
    responses=examples.shown(examples.SERVER)
    | refusals(errors.ServerNotFound, errors.AmbiguousName),
)
def show_server(server: NameOrId) -> shapes.Server:
    """The server; `state` is `missing` when libvirt no longer has its domain."""
    with reading() as session:
        return shown(session, [lookups.server(session, server)])[0]


@router.delete(
    "/servers/{server}",
    summary="Forget a server",
    responses=examples.shown(examples.FORGOTTEN)
    | refusals(
        errors.ServerNotFound, errors.AmbiguousName, errors.ServerBusy, errors.SnapshotExists
    ),
)
def forget(server: NameOrId) -> shapes.Forgotten:
    """Ends the registration and its schedules. The VM stays, and so do its images: how many.

    Refused while work on it is queued or running, and while it has a snapshot.
    """
    return settled(lambda session: _forget(session, server))


def _forget(session: Session, reference: str) -> shapes.Forgotten:
    operation: Any = Operation
    server = lookups.server(session, reference)
    session.refresh(server, with_for_update=True)
    query = select(Operation).where(
        operation.server_id == server.id, operation.state.in_(("queued", "running"))
    )
    if busy := session.scalars(query.order_by(operation.seq)).first():
        raise errors.ServerBusy(
            f"Operation {busy.id} ({busy.kind}) on server {server.name!r} is {busy.state}. Nothing "
            "was changed; wait for its end or cancel it, then ask again.",
            operation=busy.id,
        )
    if server.held_by:
        raise errors.ServerBusy(
            f"Operation {server.held_by} is at work on server {server.name!r}. Nothing was "
            "changed; wait for its end or cancel it, then ask again.",
            operation=server.held_by,
        )
    if snapshot := lookups.snapshot_of(session, server.id):
        raise errors.SnapshotExists(
            f"Server {server.name!r} has a snapshot, which could not be reached once the server is "
            "forgotten. Nothing was changed; delete the snapshot first "
            f"(`triptych snapshot delete {server.name}`), then ask again.",
            conflict=snapshot.id,
        )
    moment = now()
    left = forgetting.forget(session, server, moment)
    _end_empty_farms(session, server, moment)
    return shapes.Forgotten(
        id=server.id,
        name=server.name,
        forgotten_at=moment,
        images_kept=left.images,
        images_kept_bytes=left.images_bytes,
        schedules_ended=left.schedules_ended,
    )


def _end_empty_farms(session: Session, server: Server, moment: datetime) -> None:
    """The farm that it was the last clone of ends with it."""
    row: Any = Clone
    query = select(row.farm_id).where(row.server_id == server.id, row.farm_id.is_not(None))
    for farm_id in session.scalars(query.distinct()):
        if farm := session.get(Farm, farm_id, with_for_update=True):
            farms.end_if_empty(session, farm, moment)
