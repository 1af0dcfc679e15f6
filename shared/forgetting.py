"""The end of a server's registration: what ends with it, and what stays."""

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import delete, func, select, update
from sqlmodel import Session

from shared import events
from shared.models import Clone, Image, Schedule, Server


class Left(NamedTuple):
    images: int
    images_bytes: int
    schedules_ended: list[str]


def forget(session: Session, server: Server, moment: datetime) -> Left:
    """End the registration and the schedules; the images stay. The caller has seen to the rest."""
    clone: Any = Clone
    schedule: Any = Schedule
    image: Any = Image
    session.execute(update(Clone).where(clone.server_id == server.id).values(state="deleted"))
    server.forgotten_at = moment
    ended = session.scalars(
        delete(Schedule).where(schedule.server_id == server.id).returning(schedule.kind)
    )
    images, size = session.execute(
        select(func.count(), func.coalesce(func.sum(image.bytes), 0)).where(
            image.server_id == server.id, image.deleted_at.is_(None)
        )
    ).one()
    left = Left(images, size, sorted(ended))
    events.emit(
        session,
        "server.forgotten",
        server.id,
        name=server.name,
        host=server.host,
        images_kept=images,
    )
    return left
