"""May this command start, and on which server does it work?

Names are resolved to ids here, so that a rename afterwards changes nothing, and what can
be refused is refused before an operation exists. The handlers check again what may have
changed while the operation was queued.
"""

from datetime import datetime
from functools import singledispatch
from typing import Any, NamedTuple

from sqlalchemy import or_, select
from sqlmodel import Session

from shared import errors, farms, lookups
from shared.commands import (
    CloneSource,
    Command,
    CreateClones,
    CreateImage,
    DeleteClone,
    DeleteFarm,
    DeleteImage,
    DeleteSnapshot,
    ForgetRestore,
    ForgetRevert,
    PromoteSnapshot,
    RestoreImage,
    RetryFarm,
    RevertSnapshot,
    StartFarm,
    StopFarm,
    TakeSnapshot,
    UndoRestore,
    UndoRevert,
    VerifyImage,
)
from shared.database import now
from shared.models import Clone, Domain, Farm, Image, Operation, Server, Snapshot


class Admitted(NamedTuple):
    server: Server
    command: Command


def _refuse_frozen_memory(command: TakeSnapshot) -> None:
    if command.with_memory and command.quiesce == "require":
        raise errors.Unsupported(
            "A snapshot with memory cannot be quiesced: the guest would be frozen whenever it is "
            "resumed from it. Nothing was started; leave out `with_memory` or `quiesce`."
        )


def _refuse_memory(command: CreateClones) -> None:
    """What no server allows; what this one does not is the cloner's to say."""
    if not command.with_memory:
        return
    reason = ""
    if command.source.kind == "image":
        reason = "An image holds disks alone, so no clone of it can have its memory."
    elif not command.start:
        reason = (
            "A clone with memory runs from the start: paused it would be its source's double "
            "until somebody resumes it."
        )
    elif command.identity in ("cloud-init", "offline"):
        reason = (
            f"Clones with memory do not boot, so that `identity: {command.identity}` cannot renew "
            "what their guests hold; `agent` can."
        )
    elif command.quiesce == "require":
        reason = "Clones with memory cannot be quiesced: each of them would be frozen."
    if reason:
        raise errors.Unsupported(
            f"{reason} Nothing was started; leave out `with_memory` or what does not go with it."
        )


def _refuse_snapshot_without_memory(snapshot: Snapshot) -> None:
    if not snapshot.with_memory:
        raise errors.SnapshotWithoutMemory(
            "The snapshot was taken without memory. Nothing was started; clone its disks alone "
            "(leave out `with_memory`), or take another one with memory.",
            conflict=snapshot.id,
        )


def _refuse_agent_of_the_stopped(command: CreateClones) -> None:
    if command.identity == "agent" and not command.start:
        raise errors.Unsupported(
            "A guest agent answers in a running guest only, so that it cannot renew the identity "
            "of a clone that is not started. Nothing was started; leave `start: false` "
            "(`--no-start`) out, or choose `identity: auto`: where its source's agent answers it "
            "is renewed when its farm is started."
        )


def _refuse_taken_image_name(session: Session, server: Server, name: str | None) -> None:
    if name is None:
        return
    query = select(Image).where(
        Image.server_id == server.id,  # type: ignore[arg-type]
        Image.name == name,  # type: ignore[arg-type]
        Image.deleted_at.is_(None),  # type: ignore[union-attr]
    )
    if taken := session.scalars(query).first():
        raise errors.ImageNameTaken(
            f"Server {server.name!r} has an image named {name!r}. Choose another name, or leave "
            "it out and one is made from the date.",
            conflict=taken.id,
        )


@singledispatch
def admit(command: Command, session: Session) -> Admitted:
    """Raises a TriptychError that says why the command cannot start."""
    raise NotImplementedError(type(command))


@admit.register
def _(command: TakeSnapshot, session: Session) -> Admitted:
    _refuse_frozen_memory(command)
    server = lookups.server(session, command.server)
    existing = lookups.snapshot_of(session, server.id)
    if existing and not command.replace:
        raise errors.SnapshotExists(
            f"Server {server.name!r} has a snapshot already; a server has at most one. Delete it, "
            "or ask with `replace: true` (`--replace`): then the new one is taken whole before "
            "the old one goes.",
            conflict=existing.id,
        )
    return Admitted(server, command.model_copy(update={"server": server.id}))


@admit.register
def _(command: RevertSnapshot, session: Session) -> Admitted:
    server = lookups.server(session, command.server)
    snapshot = lookups.snapshot(session, server, command.snapshot)
    pinned = {"server": server.id, "snapshot": snapshot.id}
    return Admitted(server, command.model_copy(update=pinned))


@admit.register
def _(command: DeleteSnapshot, session: Session) -> Admitted:
    server = lookups.server(session, command.server, forgotten=True)
    snapshot = lookups.snapshot(session, server)
    pinned = {"server": server.id, "snapshot": command.snapshot or snapshot.id}
    return Admitted(server, command.model_copy(update=pinned))


@admit.register
def _(command: PromoteSnapshot, session: Session) -> Admitted:
    server = lookups.server(session, command.server)
    snapshot = lookups.snapshot(session, server, command.snapshot)
    _refuse_taken_image_name(session, server, command.name)
    pinned = {"server": server.id, "snapshot": snapshot.id}
    return Admitted(server, command.model_copy(update=pinned))


@admit.register
def _(command: CreateImage, session: Session) -> Admitted:
    server = lookups.server(session, command.server)
    _refuse_taken_image_name(session, server, command.name)
    return Admitted(server, command.model_copy(update={"server": server.id}))


@admit.register(RestoreImage)
@admit.register(DeleteImage)
@admit.register(VerifyImage)
def _(command: RestoreImage | DeleteImage | VerifyImage, session: Session) -> Admitted:
    image = lookups.held_image(session, command.image)
    if isinstance(command, VerifyImage) and command.boot:
        raise errors.Unsupported(
            "The boot proof is not supported by this version. Nothing was started; leave `boot` "
            "out to check hashes and disk structure."
        )
    if isinstance(command, RestoreImage):
        refuse_unusable(image)
    server = lookups.standing_for(session, lookups.server(session, image.server_id, forgotten=True))
    return Admitted(server, command.model_copy(update={"image": image.id}))


def refuse_unusable(image: Image) -> None:
    """Raise ImageNotUsable where a verification found it damaged or missing."""
    if image.state != "complete":
        raise errors.ImageNotUsable(
            f"Image {image.name!r} is {image.state}, so nothing was changed. "
            "Use another image of the server.",
            conflict=image.id,
        )


@admit.register
def _(command: CreateClones, session: Session) -> Admitted:
    _refuse_memory(command)
    _refuse_agent_of_the_stopped(command)
    server, source = _source(session, command.source, command.with_memory)
    domain: Any = Domain
    names = select(domain.name).where(domain.host == server.host, domain.name.in_(command.names))
    domains = set(session.scalars(names))
    _refuse_taken_clone_names(session, server.host, command, command.names, domains)
    return Admitted(server, command.model_copy(update={"source": source}))


def _source(session: Session, source: CloneSource, with_memory: bool) -> tuple[Server, CloneSource]:
    """What clones are made from, by id, and the server in whose line that is done."""
    if source.kind == "image":
        image = lookups.held_image(session, source.id)
        refuse_unusable(image)
        server = lookups.server(session, image.server_id, forgotten=True)
        return lookups.standing_for(session, server), CloneSource(kind="image", id=image.id)
    server = lookups.server(session, source.id)
    if source.kind == "server":
        return server, CloneSource(kind="server", id=server.id)
    snapshot = lookups.snapshot(session, server, source.snapshot)
    if with_memory:
        _refuse_snapshot_without_memory(snapshot)
    return server, CloneSource(kind="snapshot", id=server.id, snapshot=snapshot.id)


def _refuse_taken_clone_names(
    session: Session, host: str, command: CreateClones, names: list[str], domains: set[str]
) -> None:
    clones = select(Clone.name).where(  # type: ignore[call-overload]
        Clone.host == host,
        Clone.name.in_(names),  # type: ignore[attr-defined]
        or_(Clone.state == "queued", Clone.state == "making"),  # type: ignore[arg-type]
    )
    taken = sorted({*domains, *session.scalars(clones)})
    if taken:
        raise errors.CloneNameTaken(
            f"{', '.join(map(repr, taken))}: taken by a domain or a clone in the making on host "
            f"{host!r}. Nothing was started; choose another name or pattern"
            f"{_other_numbers(session, host, command)}.",
            conflict=taken[0],
        )


def _other_numbers(session: Session, host: str, command: CreateClones) -> str:
    """How to have as many clones of that pattern beside those there are."""
    if "{n" not in command.name:
        return ""
    domain: Any = Domain
    clone: Any = Clone
    there = select(domain.name).where(domain.host == host)
    coming = select(clone.name).where(clone.host == host, clone.state.in_(("queued", "making")))
    taken = {*session.scalars(there), *session.scalars(coming)}
    for first in range(command.first + 1, command.first + len(taken) * command.count + 1):
        if taken.isdisjoint(command.model_copy(update={"first": first}).names):
            return f", or number from {first} on (`first: {first}`, `--first {first}`)"
    return ""


@admit.register(StartFarm)
@admit.register(StopFarm)
@admit.register(DeleteFarm)
def _(command: StartFarm | StopFarm | DeleteFarm, session: Session) -> Admitted:
    farm = lookups.farm(session, command.farm)
    server = lookups.server(session, farm.server_id, forgotten=True)
    return Admitted(server, command.model_copy(update={"farm": farm.id}))


@admit.register
def _(command: RetryFarm, session: Session) -> Admitted:
    farm = lookups.held_farm(session, command.farm)
    names = [clone.name for clone in farms.failed(session, farm)]
    if not names:
        raise errors.NothingToRetry(
            f"No clone of farm {farm.name!r} has failed, so nothing was started. "
            f"`triptych farm show '{farm.name}'` shows what became of each."
        )
    first = CreateClones.model_validate(farm.command)
    source = first.source
    try:
        server, _ = _source(session, source, first.with_memory)
    except (errors.NotFound, errors.ImageNotUsable) as error:
        raise errors.FarmSourceGone(
            f"Farm {farm.name!r} was made from {source.kind} {source.id}, which cannot be cloned "
            f"again: {error.detail} Nothing was started. Make a new farm of another source, and "
            "delete this one if it is not needed.",
            conflict=source.id,
        ) from error
    # A domain of one's name is for that clone to say: the others are made.
    _refuse_taken_clone_names(session, server.host, first, names, set())
    return Admitted(server, command.model_copy(update={"farm": farm.id}))


@admit.register
def _(command: DeleteClone, session: Session) -> Admitted:
    clone = lookups.clone(session, command.clone)
    if clone.state == "deleted" or clone.farm_id is None:
        raise errors.CloneNotFound(f"Clone {clone.name!r} ({clone.id}) is deleted already.")
    if clone.state in ("queued", "making"):
        raise errors.ServerBusy(
            f"Clone {clone.name!r} is being made by operation {clone.operation_id}. Nothing was "
            "changed; wait for its end or cancel it, then ask again.",
            operation=clone.operation_id,
        )
    farm = session.get_one(Farm, clone.farm_id)
    server = lookups.server(session, clone.server_id or farm.server_id, forgotten=True)
    return Admitted(server, command.model_copy(update={"clone": clone.id}))


@admit.register(UndoRevert)
@admit.register(UndoRestore)
@admit.register(ForgetRevert)
@admit.register(ForgetRestore)
def _(
    command: UndoRevert | UndoRestore | ForgetRevert | ForgetRestore, session: Session
) -> Admitted:
    operation = lookups.operation(session, command.operation)
    if isinstance(command, UndoRevert | UndoRestore):
        until = refuse_if_not_undoable(operation)
        if until <= now():
            raise errors.NotUndoable(
                f"The time to undo operation {operation.id} was over at "
                f"{until:%Y-%m-%d %H:%M} UTC; what it replaced is gone or going."
            )
    server = lookups.server(session, operation.server_id, forgotten=True)
    return Admitted(server, command)


def refuse_if_not_undoable(operation: Operation) -> datetime:
    """Raise NotUndoable where nothing is set aside; returns until when an undo may be asked for.

    One that was asked for in time may come to its turn later: what it puts back is there still,
    since what drops that stands behind it in the server's line.
    """
    if operation.undo is None or operation.undo_until is None:
        raise errors.NotUndoable(
            f"Operation {operation.id} ({operation.kind}, {operation.state}) set nothing aside "
            "that could be put back, or it was undone already. Only a revert or a restore that "
            "succeeded can be undone."
        )
    return operation.undo_until
