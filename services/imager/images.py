"""The story of an image: created, restored (and undone), promoted from a snapshot, deleted."""

from sqlalchemy import select
from sqlmodel import Session

from services.imager import verification
from shared import errors, events, lookups, restoring, rotation
from shared.commands import (
    CreateImage,
    DeleteImage,
    ForgetRestore,
    PromoteSnapshot,
    RestoreImage,
    UndoRestore,
)
from shared.copying import Stored, copy_server, copy_stored, vault
from shared.database import now, reading
from shared.ids import new_id
from shared.manifest import ManifestAbout
from shared.models import Image, Schedule, ScheduleRun, Server
from shared.operations.admission import refuse_unusable
from shared.operations.context import Context, Outcome
from shared.operations.journal import Step
from shared.operations.runner import handles
from shared.runs import too_late


@handles(CreateImage)
def create(context: Context, command: CreateImage) -> Outcome:
    """Copy every writable disk of the server into a folder that explains itself (I1).

    Where its schedule requires that, the copy is verified before it is an image at all.
    """
    with reading() as session:
        server = lookups.server(session, command.server)
        schedule, run = _run_of(session, context.id)
    if context.operation.attempt == 1:  # begun in time, it may take as long as it takes
        _refuse_missed(run)
    image_id = new_id("img")
    about = _about(command, schedule.kind if schedule else "manual")
    stored = copy_server(context, server, "image", image_id, quiesce=command.quiesce, about=about)
    image = stored.image_row()
    if schedule:
        image.schedule_id = schedule.id
        if schedule.require == "verified":
            verification.require_whole(context, image)
    return _created(server, image, stored)


@handles(PromoteSnapshot)
def promote(context: Context, command: PromoteSnapshot) -> Outcome:
    """Make the snapshot an image (S6): its extents are shared where the file system can."""
    with reading() as session:
        server = lookups.server(session, command.server)
        snapshot = lookups.snapshot(session, server, command.snapshot)
    image_id = new_id("img")
    source = vault().folder("snapshot", server.id, snapshot.id)
    about = _about(command, "promoted")
    stored = copy_stored(context, source, server, "image", image_id, about)
    return _created(server, stored.image_row(), stored)


def _about(command: CreateImage | PromoteSnapshot, origin: str) -> ManifestAbout:
    return ManifestAbout(
        name=command.name,
        description=command.description,
        origin=origin,
        pinned=command.pinned,
    )


def _run_of(session: Session, operation_id: str) -> tuple[Schedule | None, ScheduleRun | None]:
    """The schedule whose run this operation is, and that run, if it is one's."""
    query = (
        select(Schedule, ScheduleRun)
        .join(ScheduleRun, ScheduleRun.schedule_id == Schedule.id)  # type: ignore[arg-type]
        .where(ScheduleRun.operation_id == operation_id)  # type: ignore[arg-type]
    )
    found = session.execute(query).one_or_none()
    return (found[0], found[1]) if found else (None, None)


def _refuse_missed(run: ScheduleRun | None) -> None:
    """A host that comes back late makes no image that another is about to follow (I5)."""
    if run and run.give_up_at and run.give_up_at <= now():
        raise errors.SlotMissed(too_late(run.give_up_at))


def _created(server: Server, image: Image, stored: Stored) -> Outcome:
    """The new image is complete on disk; only now may rotation take the oldest (I4)."""

    def apply(session: Session) -> list[Step]:
        taken = select(Image).where(
            Image.server_id == server.id,  # type: ignore[arg-type]
            Image.name == image.name,  # type: ignore[arg-type]
            Image.deleted_at.is_(None),  # type: ignore[union-attr]
        )
        if session.scalars(taken).first():
            raise errors.ImageNameTaken(
                f"Server {server.name!r} has got an image named {image.name!r} meanwhile; "
                "the new one was removed again. Choose another name."
            )
        session.add(image)
        session.flush()
        events.emit(session, "image.created", server.id, image=image.id, origin=image.origin)
        if image.verified_at:
            verification.tell(session, image)
        return [_removal(session, old, "image.rotated") for old in rotation.due(session, image)]

    return Outcome({"image": image.id, **stored.facts()}, apply)


def _removal(session: Session, image: Image, fact: str) -> Step:
    """Mark the row as gone; the step that is returned removes the files."""
    image.deleted_at = now()
    session.add(image)
    events.emit(session, fact, image.server_id, image=image.id, name=image.name)
    folder = vault().folder("image", image.server_id, image.id)
    return "remove_copy", {"folder": str(folder)}


@handles(DeleteImage)
def delete(context: Context, command: DeleteImage) -> Outcome:
    """Delete the image; one that is gone already needs no work."""

    def apply(session: Session) -> list[Step]:
        image = session.get(Image, command.image)
        if image is None or image.deleted_at:
            return []
        return [_removal(session, image, "image.deleted")]

    context.phase("deleting")
    with reading() as session:
        image = session.get(Image, command.image)
    if image:
        vault().refuse_read_only(vault().folder("image", image.server_id, image.id))
    return Outcome({"image": command.image}, apply)


@handles(RestoreImage)
def restore(context: Context, command: RestoreImage) -> Outcome:
    """Put the original server back as it was (I7), also when its domain is gone."""
    with reading() as session:
        image = lookups.image(session, command.image)
        refuse_unusable(image)
        server = lookups.server(session, image.server_id, forgotten=True)
        server = lookups.standing_for(session, server)
    folder = vault().folder("image", image.server_id, image.id)
    replaced = restoring.put_back(context, server, folder, definition="stored")

    def apply(session: Session) -> None:
        session.merge(server).forgotten_at = None
        events.emit(session, "image.restored", server.id, image=image.id)

    return replaced.outcome({"image": image.id}, apply)


@handles(UndoRestore)
def undo(context: Context, command: UndoRestore) -> Outcome:
    return restoring.undo(context, command.operation)


@handles(ForgetRestore)
def forget(context: Context, command: ForgetRestore) -> Outcome:
    return restoring.forget(context, command.operation)
