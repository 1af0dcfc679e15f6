"""What the copies in each host's vault take up, from their rows.

The rows get what is measured from the host's workers (shared.tending.measurer).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import case, func, select
from sqlmodel import Session

from shared.models import Image, Server, Snapshot


@dataclass
class Usage:
    """Sums over the snapshots and images of one host; bytes.

    `apparent_bytes` is what they would take up if they shared nothing. Of those that were
    measured, `unique_bytes` is what each would free by its deletion, `shared_bytes` the rest,
    counted for each copy that has it.
    """

    copies: int = 0
    measured: int = 0
    apparent_bytes: int = 0
    unique_bytes: int = 0
    shared_bytes: int = 0
    measured_at: datetime | None = field(default=None)
    """When the one was measured whose turn was longest ago."""


def by_host(session: Session) -> Mapping[str, Usage]:
    """The usage of each host's vault; two queries. A host without copies has zeros."""
    found: defaultdict[str, Usage] = defaultdict(Usage)
    for model in (Snapshot, Image):
        row: Any = model
        shared = case((row.unique_bytes < row.bytes, row.bytes - row.unique_bytes), else_=0)
        query: Any = (
            select(
                Server.host,  # type: ignore[call-overload]
                func.count(),
                func.count(row.unique_bytes),
                func.sum(row.bytes),
                func.sum(row.unique_bytes),
                func.sum(shared),
                func.min(row.measured_at),
            )
            .join(Server, Server.id == row.server_id)
            .where(row.deleted_at.is_(None))
            .group_by(Server.host)
        )
        for host, *sums, measured_at in session.execute(query):
            usage = found[host]
            copies, measured, apparent, unique, sharing = (int(each or 0) for each in sums)
            usage.copies += copies
            usage.measured += measured
            usage.apparent_bytes += apparent
            usage.unique_bytes += unique
            usage.shared_bytes += sharing
            moments = [each for each in (usage.measured_at, measured_at) if each]
            usage.measured_at = min(moments, default=None)
    return found
