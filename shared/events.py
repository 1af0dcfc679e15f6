"""Facts that happened: written with what they tell of, relayed to the stream afterwards."""

import json
from datetime import UTC
from typing import Any

from sqlalchemy import select, update
from sqlmodel import Session

from shared.broker import redis_client
from shared.database import now, reading, transaction
from shared.models import Event

STREAM = "triptych:events"
_STREAM_LENGTH = 100_000
BATCH = 500


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


def relay() -> int:
    """Append events not yet relayed to the Redis stream, oldest first; returns how many.

    At least once: a crash between the append and the commit, or another relay at the same
    time, sends them again with the same CloudEvents id. No transaction is open meanwhile, so
    that a slow broker holds nobody up. Raises redis.RedisError when it is away.
    """
    row: Any = Event
    with reading() as session:
        query = select(Event).where(row.relayed_at.is_(None)).order_by(row.seq)
        pending = list(session.scalars(query.limit(BATCH)))
    if not pending:
        return 0
    pipeline = redis_client().pipeline(transaction=True)
    for event in pending:
        document = {"event": json.dumps(as_cloudevent(event))}
        pipeline.xadd(STREAM, document, maxlen=_STREAM_LENGTH, approximate=True)  # type: ignore[arg-type]
    pipeline.execute()
    with transaction(durable=False) as session:
        sent = [event.seq for event in pending]
        session.execute(update(Event).where(row.seq.in_(sent)).values(relayed_at=now()))
    return len(pending)
