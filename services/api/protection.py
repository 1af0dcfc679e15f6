"""Which servers lack what their schedules promise.

An enabled schedule promises that the server's newest good image is never older than its period,
its catch-up window and `TOLERANCE` together. Good is any whole image of the server, by whom ever
it was made; where the schedule requires that, only one whose last verification passed. The
promise holds from that long after the schedule was set. A server without an enabled schedule is
promised nothing.
"""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, exists, literal, or_

from shared.database import UTCDateTime, earlier
from shared.models import Image, Schedule, Server
from shared.rotation import PASSED

PERIOD = {"daily": timedelta(days=1), "weekly": timedelta(weeks=1)}
TOLERANCE = timedelta(hours=2)
"""For the copy itself and what is ahead of it, and for the hour that a day may be longer."""


def unprotected(moment: datetime) -> ColumnElement[bool]:
    """The condition on `Server`, as of that moment.

    Computed, not kept: each probe is one look into an index (`image_whole`), and what images do
    (made, deleted, found damaged, found again) cannot fail to be noticed.
    """
    schedule: Any = Schedule
    image: Any = Image
    server: Any = Server
    periods = {kind: int(period.total_seconds()) for kind, period in PERIOD.items()}
    allowed = (
        case(periods, value=schedule.kind) + schedule.catch_up_s + int(TOLERANCE.total_seconds())
    )
    since = earlier(literal(moment, UTCDateTime()), allowed)
    fresh = exists().where(
        image.server_id == schedule.server_id,
        image.deleted_at.is_(None),
        # Not a parameter: a plan for any state could not use the index, which is of this one.
        image.state == literal("complete", literal_execute=True),
        image.created_at > since,
        or_(schedule.require == "complete", image.verified_result == PASSED),
    )
    return and_(
        server.forgotten_at.is_(None),
        exists().where(
            schedule.server_id == server.id,
            schedule.enabled,
            schedule.created_at <= since,
            ~fresh,
        ),
    )
