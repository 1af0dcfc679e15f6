"""Hosts: what each can do, the libvirt domains it has, and whether it takes new work."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import func, select
from sqlmodel import Session

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from services.api.work import Empty, NameOrId, settled
from shared import errors, lookups, usage
from shared.database import reading
from shared.models import Domain, Host, Operation, Server
from shared.operations import drain as draining

router = APIRouter(tags=["hosts"])


def _shown(session: Session, rows: list[Host]) -> list[shapes.Host]:
    """The hosts with what each has to do and holds, three queries however many there are."""
    row: Any = Operation
    query = (
        select(row.host, row.state, func.count())
        .where(row.state.in_(("queued", "running")), row.host.in_([each.name for each in rows]))
        .group_by(row.host, row.state)
    )
    load: dict[str, dict[str, int]] = {}
    for host, state, count in session.execute(query):
        load.setdefault(host, {})[state] = count
    used = usage.by_host(session)
    return [_shape(each, load.get(each.name, {}), used.get(each.name)) for each in rows]


def _shape(row: Host, load: dict[str, int], used: usage.Usage | None) -> shapes.Host:
    facts = {name: row.facts[name] for name in shapes.Host.model_fields if name in row.facts}
    return shapes.Host.model_validate(
        {
            **facts,
            "name": row.name,
            "answering": row.answering,
            "silent": row.silent,
            "draining": row.draining_since is not None,
            "operations": load,
            "vault_usage": asdict(used or usage.Usage()),
            "last_seen_at": row.last_seen_at,
            "problem": row.problem,
        }
    )


@router.get("/hosts", summary="List hosts", responses=examples.paged(examples.HOST) | refusals())
def list_hosts(
    request: Request, response: Response, asked: Annotated[PageQuery, Query()]
) -> Page[shapes.Host]:
    """The libvirt hosts whose workers have reported, by name."""
    row: Any = Host
    with reading() as session:
        rows, cursor = paging.fetch(session, select(Host), row.name, asked)
        items = _shown(session, rows)
    return paging.page(request, response, items, cursor)


@router.get(
    "/hosts/{host}",
    summary="Show a host",
    responses=examples.shown(examples.HOST) | refusals(errors.HostNotFound),
)
def show_host(host: NameOrId) -> shapes.Host:
    """What the host can do (reflink, quiesce, memory), its space, used and free, any problem."""
    with reading() as session:
        return _shown(session, [lookups.host(session, host)])[0]


@router.post(
    "/hosts/{host}/drain",
    summary="Drain a host",
    responses=examples.shown({**examples.HOST, "draining": True}) | refusals(errors.HostNotFound),
)
def drain(request: Request, host: NameOrId, body: Empty) -> shapes.Host:
    """From now on new work on its servers is refused; what is queued or running goes on.

    It is drained when `operations` counts none. Schedules rest until it is resumed.
    """
    drained = settled(lambda session: _shown(session, [draining.drain(session, host)])[0])
    request.app.state.relay.kick()
    return drained


@router.post(
    "/hosts/{host}/resume",
    summary="Resume a host",
    responses=examples.shown(examples.HOST) | refusals(errors.HostNotFound),
)
def resume(request: Request, host: NameOrId, body: Empty) -> shapes.Host:
    """The host takes new work again; slots missed meanwhile are treated as after a downtime."""
    resumed = settled(lambda session: _shown(session, [draining.resume(session, host)])[0])
    request.app.state.relay.kick()
    return resumed


@router.get(
    "/hosts/{host}/domains",
    summary="List a host's domains",
    responses=examples.paged(examples.DOMAIN) | refusals(errors.HostNotFound),
)
def list_domains(
    request: Request, response: Response, host: NameOrId, asked: Annotated[PageQuery, Query()]
) -> Page[shapes.Domain]:
    """Every libvirt domain of the host, by name; `server` is set on the registered ones."""
    row: Any = Domain
    server: Any = Server
    with reading() as session:
        found = lookups.host(session, host)
        query = select(Domain).where(row.host == found.name)
        rows, cursor = paging.fetch(session, query, row.name, asked)
        registered = select(server.domain_uuid, server.id).where(
            server.host == found.name,
            server.forgotten_at.is_(None),
            server.domain_uuid.in_([each.uuid for each in rows]),
        )
        ids = {uuid: id_ for uuid, id_ in session.execute(registered)}
    items = [shapes.Domain.of(each, ids.get(each.uuid)) for each in rows]
    return paging.page(request, response, items, cursor)
