"""Rotation (I4): which images of a schedule go once a new one is complete, and which never do.

Counted is what the schedule asks for: whole images, or only verified ones. Manual and pinned
images neither count nor go; failed and partial ones have no row. The newest good image and the
newest verified one always stay. What a queued operation is going to use goes after a later run.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared.commands import RetryFarm
from shared.models import Farm, Image, Operation, Schedule

PASSED = "passed"
"""The result of a verification that found nothing wrong."""


def due(session: Session, newest: Image) -> list[Image]:
    """The images that make room for `newest`, oldest first; none when it has no schedule, or is
    not what that counts. No one can pin them, or ask for work with them, before the commit."""
    schedule = session.get(Schedule, newest.schedule_id) if newest.schedule_id else None
    if schedule is None or not _counts(schedule, newest):
        return []
    before = list(session.scalars(_whole(schedule, but=newest).with_for_update()))
    passed = newest.verified_result == PASSED
    return _free(session, schedule, _surplus(schedule, before, passed))


def due_next(session: Session, schedule: Schedule) -> list[Image]:
    """The images that would go if the schedule's next run succeeded now, oldest first."""
    before = list(session.scalars(_whole(schedule)))
    return _free(session, schedule, _surplus(schedule, before, schedule.require == "verified"))


def _whole(schedule: Schedule, but: Image | None = None) -> Any:
    """Of the schedule's images those that are whole, newest first."""
    row: Any = Image
    query = select(Image).where(
        row.schedule_id == schedule.id, row.deleted_at.is_(None), row.state == "complete"
    )
    if but is not None:  # by the clock it may be older than others: that may have been put back
        query = query.where(row.id != but.id)
    return query.order_by(row.created_at.desc(), row.id.desc())


def _counts(schedule: Schedule, image: Image) -> bool:
    return schedule.require != "verified" or image.verified_result == PASSED


def _surplus(schedule: Schedule, before: Sequence[Image], passed: bool) -> list[Image]:
    """What of the images (newest first) a newer one that counts makes superfluous, oldest first;
    `passed`: whether that one is verified."""
    unpinned = [image for image in before if not image.pinned]
    good = [number for number, image in enumerate(unpinned) if _counts(schedule, image)]
    beside = schedule.keep - 1
    if len(good) < beside:
        return []
    older = unpinned[good[beside - 1] + 1 :] if beside else unpinned
    verified = next((image for image in before if image.verified_result == PASSED), None)
    return [image for image in reversed(older) if passed or image is not verified]


def _free(session: Session, schedule: Schedule, images: list[Image]) -> list[Image]:
    """Without those that operations waiting in the server's line will read."""
    row: Any = Operation
    waiting = select(Operation).where(row.server_id == schedule.server_id, row.state == "queued")
    wanted: set[str] = set()
    for operation in session.scalars(waiting):
        command = operation.command
        if operation.kind == RetryFarm.kind:
            command = session.get_one(Farm, command["farm"]).command
        source = command.get("source") or {}
        wanted |= {str(id_) for id_ in (command.get("image"), source.get("id")) if id_}
    return [image for image in images if image.id not in wanted]
