"""What ended operations add up to, for the counters of /metrics.

Counted in the transaction that ends each of them, not computed when somebody looks: so that
looking costs the same however long the history is, and no counter falls when old operations
are deleted.
"""

from collections import defaultdict
from functools import cache
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session

from shared.models import Operation, Tally

BOUNDS = {
    "duration": (1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0),
    "pause": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0),
}
"""Upper bounds of the histograms' buckets, in seconds; above the last one there is `+Inf`.
Operations that were counted in a bucket stay in it, also where the bounds are changed."""

SUM, INFINITE = "sum", "+Inf"


def count(session: Session, operation: Operation) -> None:
    """Add an operation that has just ended; to be the last that its transaction does.

    Whoever ends another operation of this kind on this host waits for the commit from here on,
    and must not be waited for in turn.
    """
    session.flush()
    of = {"host": operation.host, "service": operation.service, "kind": operation.kind}
    rows = [
        {"measure": measure, "label": label, "bucket": bucket, "value": value, **of}
        for (measure, label, bucket), value in sorted(_amounts(operation).items())
    ]
    session.connection().execute(_addition(session.get_bind().dialect.name), rows)


@cache
def _addition(dialect: str) -> Any:
    """Adds to each row's value what it is given; one for all, since each would be compiled."""
    insert = sqlite.insert if dialect == "sqlite" else postgresql.insert
    table: Any = Tally.__table__  # type: ignore[attr-defined]
    added = insert(table)
    return added.on_conflict_do_update(
        index_elements=list(table.primary_key),
        set_={"value": table.c.value + added.excluded.value},
    )


def _amounts(operation: Operation) -> dict[tuple[str, str, str], float]:
    """What the operation adds, by measure, label and bucket."""
    amounts: dict[tuple[str, str, str], float] = defaultdict(float)
    amounts["operations", operation.state, ""] = 1

    def observe(measure: str, label: str, seconds: float) -> None:
        amounts[measure, label, _bucket(measure, seconds)] = 1
        amounts[measure, label, SUM] = seconds

    if operation.started_at and operation.finished_at:
        lasted = (operation.finished_at - operation.started_at).total_seconds()
        observe("duration", operation.state, max(0.0, lasted))
    result = operation.result or {}
    if pause_ms := result.get("pause_ms"):
        observe("pause", "", pause_ms / 1000)
    made = result.get("clones", [result])
    ways = [way for each in made if (way := each.get("way"))]
    for way in ways:  # those of a farm are added up in its row, and alike
        amounts["bytes", way, ""] += operation.bytes_done / len(ways)
    return amounts


def _bucket(measure: str, seconds: float) -> str:
    return next((str(bound) for bound in BOUNDS[measure] if seconds <= bound), INFINITE)
