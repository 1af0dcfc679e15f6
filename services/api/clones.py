"""Clones: living servers made from a server, its snapshot or an image."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import ConfigDict, Field
from sqlalchemy import select

from services.api import examples, paging, shapes
from services.api.paging import Page, PageQuery
from services.api.problems import refusals
from services.api.work import IdempotencyKey, NameOrId, RequestBody, accepted, start
from shared import commands, errors, lookups
from shared.database import reading
from shared.models import Clone

router = APIRouter(tags=["clones"])

REFUSED = (
    errors.AmbiguousName,
    errors.CloneNameTaken,
    errors.HostDraining,
    errors.Unsupported,
)
Source = Literal["server", "snapshot", "image"]


class Cloning(RequestBody):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "qa-{n:03}", "count": 10}, {"name": "staging"}]}
    )

    name: commands.NamePattern = Field(description="a name, or a pattern such as `qa-{n:03}`")
    count: int = Field(1, ge=1, le=100)
    first: int = Field(1, ge=0, le=99999, description="the number of the first, for `{n}`")
    vcpus: int | None = Field(None, ge=1, le=512, description="left out: as the source has")
    memory_mib: int | None = Field(None, ge=64, le=16 * 1024 * 1024)
    with_memory: bool = Field(
        False, description="run on from the instant of the source, with what it has in memory"
    )
    linked: bool = Field(
        False,
        description="where disks cannot share extents: overlays on one copy, not a copy each",
    )
    start: bool = True
    identity: commands.IdentityWay = Field(
        "auto", description="how the guest's hostname, machine-id and SSH host keys are renewed"
    )
    expires_in_h: commands.Lifetime | None = Field(
        None, description="hours after which the farm is deleted by itself; left out: never"
    )


class LiveCloning(Cloning):
    quiesce: commands.Quiesce = "auto"


def _clone(
    request: Request, response: Response, source: Source, of: str, body: Cloning, key: str | None
) -> shapes.Operation:
    return start(
        request,
        response,
        commands.CreateClones,
        key,
        source={"kind": source, "id": of},
        **body.model_dump(),
    )


@router.post(
    "/servers/{server}/clones",
    status_code=202,
    summary="Clone a server",
    responses=accepted(errors.ServerNotFound, *REFUSED),
)
def clone_server(
    request: Request,
    response: Response,
    server: NameOrId,
    body: LiveCloning,
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Makes `count` independent servers of this one, running or not, in one operation.

    With memory, all of them run on from one instant of it; it must be running then.
    """
    return _clone(request, response, "server", server, body, key)


@router.post(
    "/servers/{server}/snapshot/clones",
    status_code=202,
    summary="Clone a server's snapshot",
    responses=accepted(
        errors.ServerNotFound, errors.SnapshotNotFound, errors.SnapshotWithoutMemory, *REFUSED
    ),
)
def clone_snapshot(
    request: Request,
    response: Response,
    server: NameOrId,
    body: Cloning,
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Makes `count` independent servers of what the snapshot holds."""
    return _clone(request, response, "snapshot", server, body, key)


@router.post(
    "/images/{image}/clones",
    status_code=202,
    summary="Clone an image",
    responses=accepted(errors.ImageNotFound, errors.ImageNotUsable, *REFUSED),
)
def clone_image(
    request: Request,
    response: Response,
    image: NameOrId,
    body: Cloning,
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Makes `count` independent servers of the image, on the host that holds it."""
    return _clone(request, response, "image", image, body, key)


@router.get("/clones", summary="List clones", responses=examples.paged(examples.CLONE) | refusals())
def list_clones(
    request: Request, response: Response, asked: Annotated[PageQuery, Query()]
) -> Page[shapes.Clone]:
    """Every clone with its lineage, newest first: from what, when and how it was made."""
    row: Any = Clone
    with reading() as session:
        query = select(Clone).where(row.state != "deleted")
        rows, cursor = paging.fetch(session, query, row.id, asked, newest_first=True)
    items = [shapes.Clone.of(each) for each in rows]
    return paging.page(request, response, items, cursor)


@router.get(
    "/clones/{clone}",
    summary="Show a clone",
    responses=examples.shown(examples.CLONE) | refusals(errors.CloneNotFound, errors.AmbiguousName),
)
def show(clone: NameOrId) -> shapes.Clone:
    """The clone's lineage, and what of its guest's identity was renewed."""
    with reading() as session:
        return shapes.Clone.of(lookups.clone(session, clone))


@router.delete(
    "/clones/{clone}",
    status_code=202,
    summary="Delete a clone",
    responses=accepted(errors.CloneNotFound, errors.AmbiguousName, errors.ServerBusy),
)
def delete(
    request: Request, response: Response, clone: NameOrId, key: IdempotencyKey = None
) -> shapes.Operation:
    """Stops and removes its VM, the files that were made for it, and its snapshot.

    Its images stay, and so do disks that it was given later or that another VM needs: the
    result names them. Of a clone that was never made only the record goes.
    """
    return start(request, response, commands.DeleteClone, key, clone=clone)
