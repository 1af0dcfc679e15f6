"""Operations as the API shows them: with the reason, where there is one, why they do not go on."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from services.api import shapes
from shared import errors
from shared.database import database_now, now
from shared.models import Host, Operation, Server
from shared.operations.runner import verdict_of

UNFINISHED = ("queued", "running")


def shown(session: Session, rows: list[Operation]) -> list[shapes.Operation]:
    """The operations, a few queries more however many of them are unfinished."""
    unfinished = [row for row in rows if row.state in UNFINISHED]
    reasons: dict[str, str | None] = {}
    if unfinished:
        host: Any = Host
        query = select(Host).where(host.name.in_({row.host for row in unfinished}))
        hosts = {each.name: each for each in session.scalars(query)}
        lines = _lines(session, {row.server_id for row in unfinished})
        clock = database_now(session)
        for row in unfinished:
            if row.state == "running":
                reasons[row.id] = _stopped(row, hosts[row.host], clock)
            else:
                reasons[row.id] = _not_begun(row, hosts[row.host], lines[row.server_id])
    return [shapes.Operation.of(row, reasons.get(row.id)) for row in rows]


def _lines(session: Session, servers: set[str]) -> dict[str, list[Any]]:
    """Each server's line: what is at work on it, from another's line or its own, then what is
    queued, first come first."""
    row: Any = Operation
    server: Any = Server
    holding = (
        select(server.id.label("server_id"), row.id, row.kind)
        .join(Operation, row.id == server.held_by)
        .where(server.id.in_(servers))
    )
    query = (
        select(row.server_id, row.seq, row.id, row.kind)
        .where(row.server_id.in_(servers), row.state.in_(UNFINISHED))
        .order_by(row.state.desc(), row.seq)  # running before queued
    )
    lines: dict[str, list[Any]] = {each: [] for each in servers}
    for each in (*session.execute(holding), *session.execute(query)):
        lines[each.server_id].append(each)
    return lines


def _not_begun(row: Operation, host: Host, line: list[Any]) -> str | None:
    if host.silent:
        return f"Host {host.name} {_silence(host)}; this starts when its workers are back."
    ids = [each.id for each in line]
    if ahead := line[: ids.index(row.id)] if row.id in ids else []:
        more = f", and {len(ahead) - 1} more after it" if len(ahead) > 1 else ""
        return f"Behind operation {ahead[0].id} ({ahead[0].kind}) on this server{more}."
    if host.problem:
        return f"Host {host.name} reports: {host.problem.rstrip('.')}."
    return None


def _stopped(row: Operation, host: Host, clock: datetime) -> str | None:
    """Why a running operation stands still: its lease has run out, and nobody can take over."""
    gone = row.lease_expires_at is None or row.lease_expires_at < clock
    if not (gone and host.silent):
        return None
    if row.committed:
        then = "finish it"
    elif verdict := verdict_of(row):
        ended = "cancelled" if verdict["code"] == errors.Cancelled.code else "failed"
        then = f"undo what was begun, and it ends as {ended}"
    else:
        then = "undo what was begun and try again"
    return (
        f"Host {host.name} {_silence(host)} and the worker's lease has run out. When its workers "
        f"are back, they {then}."
    )


def _silence(host: Host) -> str:
    if host.last_seen_at is None:
        return "has never reported"
    return f"has not reported for {_words(now() - host.last_seen_at)}"


def _words(span: timedelta) -> str:
    minutes = round(span.total_seconds() / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"
