"""Facts that happened: written with what they tell of, relayed to the stream afterwards."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared.broker import redis_client
from shared.database import now, transaction
from shared.models import Event

STREAM = "triptych:events"
_STREAM_LENGTH = 100_000


def emit(session: Session, type_: str, subject: str | None, **data: Any) -> None:
    """Record `triptych.<type_>` in the caller's transaction; `subject` is a server's id."""
    session.add(Event(type=f"triptych.{type_}", subject=subject, data=data))


def as_cloudevent(event: Event) -> dict[str, Any]:
    """CloudEvents 1.0 in the JSON event format."""
    return {
        "specversion": "1.0",
        "id": event.id,
        "source": "/triptych",
        "type": event.type,
        "subject": event.subject,
        "time": event.time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": event.data,
    }


def relay(batch: int = 500) -> int:
    """Append events not yet relayed to the Redis stream, oldest first; returns how many.

    At least once: a crash between the append and the commit sends them again, with
    the same CloudEvents id. Raises redis.RedisError when the broker is away.
    """
    import json

    with transaction() as session:
        query = select(Event).where(Event.relayed_at.is_(None)).order_by(Event.seq)  # type: ignore[union-attr,arg-type]
        pending = list(session.scalars(query.limit(batch).with_for_update(skip_locked=True)))
        if not pending:
            return 0
        client = redis_client()
        sent: datetime = now()
        for event in pending:
            client.xadd(
                STREAM,
                {"event": json.dumps(as_cloudevent(event))},
                maxlen=_STREAM_LENGTH,
                approximate=True,
            )
            event.relayed_at = sent
        return len(pending)
