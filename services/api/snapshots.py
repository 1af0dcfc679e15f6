"""Snapshots: the one picture that a server may have."""

from fastapi import APIRouter, Body, Request, Response
from pydantic import ConfigDict

from services.api import examples, shapes
from services.api.problems import refusals
from services.api.work import IdempotencyKey, NameOrId, RequestBody, accepted, start
from shared import commands, errors, lookups
from shared.database import reading

router = APIRouter(prefix="/servers/{server}/snapshot", tags=["snapshots"])

ABOUT = (errors.ServerNotFound, errors.AmbiguousName, errors.SnapshotNotFound)


class Taking(RequestBody):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"description": "before the update to 3.2"}]}
    )

    replace: bool = False
    with_memory: bool = False
    quiesce: commands.Quiesce = "auto"
    description: commands.Description = ""


class Reverting(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"with_memory": True}]})

    with_memory: bool = True


class Promotion(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "before-3.2"}]})

    name: commands.Name | None = None
    description: commands.Description = ""
    pinned: bool = False


@router.post(
    "",
    status_code=202,
    summary="Take a snapshot",
    responses=accepted(
        errors.ServerNotFound,
        errors.AmbiguousName,
        errors.SnapshotExists,
        errors.HostDraining,
        errors.Unsupported,
    ),
)
def take(
    request: Request,
    response: Response,
    server: NameOrId,
    body: Taking = Body(default_factory=Taking),
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Takes the server's snapshot; it expires after 48 hours unless configured otherwise.

    A server has at most one: another is refused, or with `replace: true` taken whole before
    the old one goes.
    """
    return start(request, response, commands.TakeSnapshot, key, server=server, **body.model_dump())


@router.get(
    "",
    summary="Show the snapshot",
    responses=examples.shown(examples.SNAPSHOT) | refusals(*ABOUT),
)
def show(server: NameOrId) -> shapes.Snapshot:
    """The server's snapshot, when it was taken, how, and when it expires."""
    with reading() as session:
        return shapes.Snapshot.of(lookups.snapshot(session, lookups.server(session, server)))


@router.delete("", status_code=202, summary="Delete the snapshot", responses=accepted(*ABOUT))
def delete(
    request: Request, response: Response, server: NameOrId, key: IdempotencyKey = None
) -> shapes.Operation:
    """Deletes the snapshot's files. The server and its images are not touched."""
    return start(request, response, commands.DeleteSnapshot, key, server=server)


@router.post(
    "/revert",
    status_code=202,
    summary="Revert to the snapshot",
    responses=accepted(*ABOUT, errors.HostDraining),
)
def revert(
    request: Request,
    response: Response,
    server: NameOrId,
    body: Reverting = Body(default_factory=Reverting),
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Puts the server back as it was when the snapshot was taken; the snapshot stays.

    A snapshot with memory resumes the guest at that very instant, also where the server is
    off now; with `with_memory: false` the server boots from the snapshot's disks, if it runs.
    What it replaces is set aside for 24 hours: undo the operation to get it back.
    """
    return start(
        request, response, commands.RevertSnapshot, key, server=server, **body.model_dump()
    )


@router.post(
    "/promote",
    status_code=202,
    summary="Promote the snapshot to an image",
    responses=accepted(*ABOUT, errors.ImageNameTaken, errors.HostDraining),
)
def promote(
    request: Request,
    response: Response,
    server: NameOrId,
    body: Promotion = Body(default_factory=Promotion),
    key: IdempotencyKey = None,
) -> shapes.Operation:
    """Makes an image of the snapshot, kept until deleted; the snapshot stays."""
    return start(
        request, response, commands.PromoteSnapshot, key, server=server, **body.model_dump()
    )
