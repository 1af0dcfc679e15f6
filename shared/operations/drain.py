"""Draining: a host takes no new work and goes on with what it has, until it is resumed.

What a person asks for anew is refused. Deleting, stopping, undoing, cancelling and beat's
housekeeping go on: they leave less to do, not more. Schedules keep their slots until the host is
resumed.
"""

from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared import errors, events, lookups
from shared.commands import (
    Command,
    DeleteClone,
    DeleteFarm,
    DeleteImage,
    DeleteSnapshot,
    ForgetRestore,
    ForgetRevert,
    StopFarm,
    UndoRestore,
    UndoRevert,
)
from shared.database import now
from shared.models import Host

GOES_ON: tuple[type[Command], ...] = (
    DeleteSnapshot,
    DeleteImage,
    DeleteClone,
    DeleteFarm,
    StopFarm,
    UndoRevert,
    UndoRestore,
    ForgetRevert,
    ForgetRestore,
)


def drain(session: Session, name: str) -> Host:
    """Refuse new work on the host from now on; once more changes nothing.

    Waits for what is being submitted at this moment, so that the caller sees it queued.
    """
    host = _locked(session, name)
    if host.draining_since is None:
        host.draining_since = now()
        events.emit(session, "host.draining", None, host=name)
    return host


def resume(session: Session, name: str) -> Host:
    host = _locked(session, name)
    if host.draining_since is not None:
        host.draining_since = None
        events.emit(session, "host.resumed", None, host=name)
    return host


def refuse_new_work(session: Session, name: str) -> None:
    """Raises HostDraining; else the host cannot begin to drain before this transaction ends."""
    host = session.get_one(Host, name, with_for_update={"read": True})
    if host.draining_since is not None:
        raise errors.HostDraining(
            f"Host {name!r} is draining: it finishes the work it has and takes no new. Nothing "
            f"was started or changed; `triptych host resume {name}` lets it take work again."
        )


def taking_work(session: Session, names: set[str]) -> set[str]:
    """Those of the hosts that do not drain, and cannot begin to before this transaction ends."""
    row: Any = Host
    query = select(row.name).where(row.name.in_(names), row.draining_since.is_(None))
    return set(session.scalars(query.order_by(row.name).with_for_update(read=True)))


def _locked(session: Session, name: str) -> Host:
    host = lookups.host(session, name)
    session.refresh(host, with_for_update=True)
    return host
