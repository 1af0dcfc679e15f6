"""Images: full copies of a server's disks, kept until deleted."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import ConfigDict, Field
from sqlalchemy import select
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
from shared import commands, errors, events, lookups
from shared.database import reading
from shared.models import Image

router = APIRouter(tags=["images"])

ABOUT = (errors.ImageNotFound, errors.AmbiguousName)
Origin = Literal["manual", "daily", "weekly", "promoted"]


class Creation(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "before-3.2"}]})

    name: commands.Name | None = Field(None, description="left out: made from the date")
    description: commands.Description = ""
    pinned: bool = Field(False, description="rotation never deletes a pinned image")
    quiesce: commands.Quiesce = "auto"


class Change(RequestBody):
    """What is left out, or null, stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pinned": True}]})

    name: commands.Name | None = None
    description: commands.Description | None = None
    pinned: bool | None = None


class Verification(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"boot": False}]})

    boot: bool = False


class ServerImagesQuery(PageQuery):
    origin: Origin | None = None


class ImagesQuery(ServerImagesQuery):
    server: commands.Reference | None = Field(None, description="id or name")


@router.post(
    "/servers/{server}/images",
    status_code=202,
    summary="Create an image",
    responses=accepted(
        errors.ServerNotFound, errors.AmbiguousName, errors.ImageNameTaken, errors.HostDraining
    ),
)
def create(
    request: Request,
    response: Response,
    server: NameOrId,
    body: Creation = Body(default_factory=Creation),
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Copies every writable disk of the server, running or not, with its definition."""
    return start(request, response, commands.CreateImage, key, server=server, **body.model_dump())


def _listed(
    request: Request, response: Response, asked: ServerImagesQuery, server: str | None
) -> Page[shapes.Image]:
    row: Any = Image
    query = select(Image).where(row.deleted_at.is_(None))
    with reading() as session:
        if server is not None:
            found = lookups.server(session, server, forgotten=True)
            query = query.where(row.server_id == found.id)
        if asked.origin is not None:
            query = query.where(row.origin == asked.origin)
        rows, cursor = paging.fetch(session, query, row.id, asked, newest_first=True)
    items = [shapes.Image.of(each) for each in rows]
    return paging.page(request, response, items, cursor)


@router.get(
    "/servers/{server}/images",
    summary="List a server's images",
    responses=examples.paged(examples.IMAGE)
    | refusals(errors.ServerNotFound, errors.AmbiguousName),
)
def list_of_server(
    request: Request,
    response: Response,
    server: NameOrId,
    asked: Annotated[ServerImagesQuery, Query()],
) -> Page[shapes.Image]:
    """The server's images, newest first. The id of a forgotten server works here too."""
    return _listed(request, response, asked, server)


@router.get(
    "/images",
    summary="List images",
    responses=examples.paged(examples.IMAGE)
    | refusals(errors.ServerNotFound, errors.AmbiguousName),
)
def list_images(
    request: Request, response: Response, asked: Annotated[ImagesQuery, Query()]
) -> Page[shapes.Image]:
    """All images, newest first, if asked those of one server or origin."""
    return _listed(request, response, asked, asked.server)


@router.get(
    "/images/{image}",
    summary="Show an image",
    responses=examples.shown(examples.IMAGE) | refusals(*ABOUT),
)
def show(image: NameOrId) -> shapes.Image:
    """The image: of which server, when and how it was made, whether it was verified."""
    with reading() as session:
        return shapes.Image.of(lookups.image(session, image))


@router.patch(
    "/images/{image}",
    summary="Rename, describe or pin an image",
    responses=examples.shown({**examples.IMAGE, "pinned": True})
    | refusals(*ABOUT, errors.ImageNameTaken),
)
def change(request: Request, image: NameOrId, body: Change) -> shapes.Image:
    """Changes what was sent; null or left out stays as it is. The copy is not touched."""
    changed = settled(lambda session: _change(session, image, body))
    request.app.state.relay.kick()
    return changed


def _change(session: Session, reference: str, body: Change) -> shapes.Image:
    row: Any = Image
    image = lookups.held_image(session, reference)
    wanted = body.model_dump(exclude_none=True)
    if (name := wanted.get("name", image.name)) != image.name:
        query = select(Image).where(
            row.server_id == image.server_id, row.name == name, row.deleted_at.is_(None)
        )
        if taken := session.scalars(query).first():
            raise errors.ImageNameTaken(
                f"The server has another image named {name!r}. Nothing was changed; choose "
                "another name.",
                conflict=taken.id,
            )
    image.sqlmodel_update(wanted)
    session.add(image)
    events.emit(session, "image.changed", image.server_id, image=image.id, changed=wanted)
    return shapes.Image.of(image)


@router.delete(
    "/images/{image}", status_code=202, summary="Delete an image", responses=accepted(*ABOUT)
)
def delete(
    request: Request, response: Response, image: NameOrId, key: IdempotencyKey = None
) -> shapes.Operation:
    """Deletes the image's files, also of a pinned one. Clones made from it stay whole."""
    return start(request, response, commands.DeleteImage, key, image=image)


@router.post(
    "/images/{image}/restore",
    status_code=202,
    summary="Restore an image",
    responses=accepted(*ABOUT, errors.ImageNotUsable, errors.HostDraining),
)
def restore(
    request: Request,
    response: Response,
    image: NameOrId,
    body: Empty,
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Puts the original server back as it was, also when its domain is gone from libvirt.

    What it replaces is set aside for 24 hours: undo the operation to get it back.
    """
    return start(request, response, commands.RestoreImage, key, image=image)


@router.post(
    "/images/{image}/verify",
    status_code=202,
    summary="Verify an image",
    responses=accepted(*ABOUT, errors.HostDraining, errors.Unsupported),
)
def verify(
    request: Request,
    response: Response,
    image: NameOrId,
    body: Verification = Body(default_factory=Verification),
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Checks the hashes of its disks against its manifest, and their structure."""
    return start(request, response, commands.VerifyImage, key, image=image, **body.model_dump())
