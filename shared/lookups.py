"""Finding things by id or name, with the error a person needs when there is none."""

from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel

from shared import errors
from shared.models import Clone, Farm, Host, Image, Operation, Schedule, Server, Snapshot

Row = TypeVar("Row", bound=SQLModel)


def _only(rows: list[Row], reference: str, what: str, missing: errors.TriptychError) -> Row:
    if not rows:
        raise missing
    if len(rows) > 1:
        ids = ", ".join(str(row.id) for row in rows)  # type: ignore[attr-defined]
        raise errors.AmbiguousName(
            f"{len(rows)} {what}s are named {reference!r}. Use one of their ids: {ids}."
        )
    return rows[0]


def host(session: Session, name: str) -> Host:
    found = session.get(Host, name)
    if found is None:
        raise errors.HostNotFound(
            f"No host named {name!r} has reported. `triptych host list` shows those that have; "
            "a host appears when its workers start."
        )
    return found


def reporting_host(session: Session, name: str) -> Host:
    """The row of the host that this process is of; made where there is none yet."""
    found = session.get(Host, name)
    if found is None:
        with suppress(IntegrityError), session.begin_nested():  # its workers start at once
            session.add(Host(name=name))
        found = session.get_one(Host, name)
    return found


def server(session: Session, reference: str, *, forgotten: bool = False) -> Server:
    """The registered server of that id or name; with `forgotten`, also one that was
    registered once (by id)."""
    if (found := session.get(Server, reference)) and (forgotten or not found.forgotten_at):
        return found
    query = select(Server).where(Server.name == reference, Server.forgotten_at.is_(None))  # type: ignore[union-attr,arg-type]
    return _only(
        list(session.scalars(query)),
        reference,
        "server",
        errors.ServerNotFound(
            f"No server {reference!r} is registered. `triptych server list` shows the registered "
            "ones, `triptych server add` registers a libvirt domain."
        ),
    )


def snapshot_of(session: Session, server_id: str) -> Snapshot | None:
    query = select(Snapshot).where(
        Snapshot.server_id == server_id,  # type: ignore[arg-type]
        Snapshot.deleted_at.is_(None),  # type: ignore[union-attr]
    )
    return session.scalars(query).one_or_none()


def standing_for(session: Session, was: Server) -> Server:
    """The server that is registered for the domain of one that was forgotten, if there is one."""
    if was.forgotten_at is None:
        return was
    query = select(Server).where(
        Server.host == was.host,  # type: ignore[arg-type]
        Server.domain_uuid == was.domain_uuid,  # type: ignore[arg-type]
        Server.forgotten_at.is_(None),  # type: ignore[union-attr]
    )
    return session.scalars(query).one_or_none() or was


def snapshot(session: Session, of: Server, meant: str | None = None) -> Snapshot:
    """The server's snapshot; raises SnapshotNotFound where it is not the one that was `meant`."""
    found = snapshot_of(session, of.id)
    if found is None:
        raise errors.SnapshotNotFound(
            f"Server {of.name!r} has no snapshot (or it has expired). "
            "Take one with `triptych snapshot take`."
        )
    if meant and found.id != meant:
        raise errors.SnapshotNotFound(
            f"The snapshot of server {of.name!r} that was meant ({meant}) has been replaced "
            f"by {found.id}, taken at {found.taken_at:%Y-%m-%d %H:%M:%S} UTC. Nothing was "
            "changed; what is asked for now is of that one."
        )
    return found


def image(session: Session, reference: str) -> Image:
    if (found := session.get(Image, reference)) and not found.deleted_at:
        return found
    query = select(Image).where(Image.name == reference, Image.deleted_at.is_(None))  # type: ignore[union-attr,arg-type]
    return _only(
        list(session.scalars(query)),
        reference,
        "image",
        errors.ImageNotFound(
            f"There is no image {reference!r}. `triptych image list` shows those there are."
        ),
    )


def held_image(session: Session, reference: str) -> Image:
    """The same, which nobody else changes, rotates out or deletes before this transaction ends."""
    found = image(session, reference)
    session.refresh(found, with_for_update=True)
    return image(session, found.id) if found.deleted_at else found


def clone(session: Session, reference: str) -> Clone:
    if found := session.get(Clone, reference):
        return found
    row: Any = Clone
    query = select(Clone).where(row.name == reference, row.state != "deleted")
    named = list(session.scalars(query.order_by(row.id.desc())))
    alive = [each for each in named if each.state not in ("failed", "cancelled")]
    return _only(
        alive or named[:1],
        reference,
        "clone",
        errors.CloneNotFound(
            f"There is no clone {reference!r}. `triptych clone list` shows those there are."
        ),
    )


def farm(session: Session, reference: str) -> Farm:
    """The farm of that id, or of that pattern of names. Of one clone the pattern is its name."""
    if (found := session.get(Farm, reference)) and not found.deleted_at:
        return found
    query = select(Farm).where(Farm.name == reference, Farm.deleted_at.is_(None))  # type: ignore[union-attr,arg-type]
    return _only(
        list(session.scalars(query)),
        reference,
        "farm",
        errors.FarmNotFound(
            f"There is no farm {reference!r}. `triptych farm list` shows those there are."
        ),
    )


def held_farm(session: Session, reference: str) -> Farm:
    """The same, which nobody else retries, extends or ends before this transaction ends."""
    found = farm(session, reference)
    session.refresh(found, with_for_update=True)
    return farm(session, found.id)


def schedule(session: Session, of: Server, kind: str) -> Schedule:
    query = select(Schedule).where(Schedule.server_id == of.id, Schedule.kind == kind)  # type: ignore[arg-type]
    found = session.scalars(query).one_or_none()
    if found is None:
        raise errors.ScheduleNotFound(
            f"Server {of.name!r} has no {kind} schedule. Set one with `triptych schedule set`."
        )
    return found


def operation(session: Session, operation_id: str) -> Operation:
    found = session.scalars(select(Operation).where(Operation.id == operation_id)).one_or_none()  # type: ignore[arg-type]
    if found is None:
        raise errors.OperationNotFound(
            f"There is no operation {operation_id!r}. `triptych operation list` shows the recent."
        )
    return found
