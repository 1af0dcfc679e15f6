"""Hosts: what each can do, and the libvirt domains it has."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import select

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from services.api.work import NameOrId
from shared import errors, lookups
from shared.database import reading
from shared.models import Domain, Host, Server

router = APIRouter(tags=["hosts"])


def _shown(row: Host) -> shapes.Host:
    facts = {name: row.facts[name] for name in shapes.Host.model_fields if name in row.facts}
    return shapes.Host.model_validate(
        {
            **facts,
            "name": row.name,
            "answering": row.answering,
            "silent": row.silent,
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
    return paging.page(request, response, [_shown(each) for each in rows], cursor)


@router.get(
    "/hosts/{host}",
    summary="Show a host",
    responses=examples.shown(examples.HOST) | refusals(errors.HostNotFound),
)
def show_host(host: NameOrId) -> shapes.Host:
    """What the host can do (reflink, quiesce, memory), its free space, and any problem."""
    with reading() as session:
        return _shown(lookups.host(session, host))


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
