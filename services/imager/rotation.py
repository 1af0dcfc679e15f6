"""Rotation (I4): which images of a schedule go, now that a new one is complete.

Manual and pinned images neither count nor go; failed and partial ones have no row. What a
queued operation is going to use goes after the next run instead.
"""

from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared.models import Image, Operation, Schedule


def due(session: Session, newest: Image) -> list[Image]:
    """The images that make room for `newest`, oldest first; none when it has no schedule."""
    schedule = session.get(Schedule, newest.schedule_id) if newest.schedule_id else None
    if schedule is None:
        return []
    row: Any = Image
    counted = select(Image).where(
        row.schedule_id == schedule.id,
        row.deleted_at.is_(None),
        row.state == "complete",
        row.pinned.is_(False),
    )
    # Locked, so that none is pinned between here and the commit.
    newest_first = counted.order_by(row.created_at.desc(), row.id.desc()).with_for_update()
    by_age = list(session.scalars(newest_first))
    in_use = _wanted(session, newest.server_id)
    return [image for image in reversed(by_age[schedule.keep :]) if image.id not in in_use]


def _wanted(session: Session, server_id: str) -> set[str]:
    """Ids of images that operations waiting in the server's line will read."""
    row: Any = Operation
    waiting = select(Operation).where(row.server_id == server_id, row.state == "queued")
    wanted: set[str] = set()
    for operation in session.scalars(waiting):
        source = operation.command.get("source") or {}
        wanted |= {str(id_) for id_ in (operation.command.get("image"), source.get("id")) if id_}
    return wanted
