"""Operations that are running and that nobody works on."""

from collections.abc import Iterator

from sqlalchemy import select

from shared.database import reading
from shared.doctor.findings import Finding
from shared.doctor.site import Site, is_lost, steps
from shared.models import Operation
from shared.operations import runner

CHECK = "operation"


def differences(site: Site) -> Iterator[Finding]:
    """Those whose worker is dead, with what of theirs is not undone."""
    for each in site.lost():
        yield Finding(
            CHECK,
            each.id,
            _detail(each),
            "--fix finishes it"
            if each.committed
            else "--fix undoes what it began; then a worker begins again, or it ends as failed",
            repair=lambda each=each: _cleared_up(each),  # type: ignore[misc]
        )


def _detail(operation: Operation) -> str:
    left = [entry.action for entry in steps(operation)]
    named = f"not {'done' if operation.committed else 'undone'}: {', '.join(left)}"
    detail = f"{operation.kind} is running and its worker is gone; {named if left else 'no step'}"
    reason = (operation.error or {}).get("message", "")
    return detail + (f" ({' '.join(reason.split()).rstrip('.')})" if reason else "")


def _cleared_up(operation: Operation) -> bool:
    runner.clear_up(operation.id)
    with reading() as session:
        query = select(Operation).where(Operation.id == operation.id)  # type: ignore[arg-type]
        current = session.scalars(query).one()
    return current.state != "running" or not is_lost(current)
