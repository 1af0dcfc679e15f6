"""What reverts and restores set aside beside the disks, against what can still be undone (E1)."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared import errors, recovery, restoring
from shared.database import now, reading, transaction
from shared.disks import setaside
from shared.doctor.findings import Finding
from shared.doctor.site import Site, spoken_for
from shared.hypervisor.locks import is_open
from shared.models import Operation
from shared.settings import settings

CHECK = "set aside"
BEAT_IS_LATE = timedelta(minutes=2)
"""So long after its time is over a promise is kept in any case: beat looks every tick."""


def differences(site: Site) -> Iterator[Finding]:
    """Broken promises, promises whose time is over, and files that nobody promised."""
    busy = {each.server_id for each in site.running()}
    for operation in _undoable(site):
        if operation.server_id in busy:
            continue
        yield from _broken(site, operation)
        yield from _overdue(site, operation)
    for folder in _folders(site):
        yield from _stray(site, folder)


def _undoable(site: Site) -> list[Operation]:
    row: Any = Operation
    with reading() as session:
        query = select(Operation).where(row.host == site.host, row.undo_until.is_not(None))
        return [each for each in session.scalars(query.order_by(row.seq)) if each.undo]


def _live(operation: Operation) -> dict[str, Path]:
    return {target: Path(path) for target, path in (operation.undo or {})["live"].items()}


def _broken(site: Site, operation: Operation) -> Iterator[Finding]:
    """It can be undone, and a file that this needs is gone."""
    if operation.undo_until is None or operation.undo_until <= now():
        return
    made = (operation.undo or {}).get("missing", ())  # these had nothing before
    needed = [path for target, path in _live(operation).items() if target not in made]
    gone = [old for path in needed if not (old := setaside.old_path(path, operation.id)).exists()]
    if gone and _is_promised_still(site, operation):
        yield Finding(
            CHECK,
            operation.id,
            f"it can be undone until {operation.undo_until:%Y-%m-%d %H:%M} UTC, and "
            f"{', '.join(map(str, gone))} is gone",
            "put the file back; else do not undo it: disks of two instants would come together",
        )


def _is_promised_still(site: Site, operation: Operation) -> bool:
    """It may have been undone since its row was read."""
    current = _known(operation.id)
    return bool(current and current.undo) and operation.server_id not in site.busy()


def _overdue(site: Site, operation: Operation) -> Iterator[Finding]:
    if operation.undo_until is None or not _is_late(operation):
        return
    over = f"the time to undo it was over at {operation.undo_until:%Y-%m-%d %H:%M} UTC"
    for folder in _folders_of(operation):
        if obstacle := _obstacle(site, folder):
            yield Finding(CHECK, str(folder), *obstacle)
            return
    yield Finding(
        CHECK,
        operation.id,
        f"{over}, and what it replaced is still kept",
        "--fix removes it; look whether beat runs, which does that",
        repair=lambda: _withdrawn(site, operation),
    )


def _folders_of(operation: Operation) -> list[Path]:
    found = {setaside.folder_of(path, operation.id) for path in _live(operation).values()}
    return sorted(each for each in found if each.is_dir())


def _is_late(operation: Operation) -> bool:
    return operation.undo_until is not None and operation.undo_until < now() - BEAT_IS_LATE


def _withdrawn(site: Site, operation: Operation) -> bool:
    """As ForgetRevert does: first the promise goes, then the files."""
    row: Any = Operation
    if any(_obstacle(site, each) for each in _folders_of(operation)):
        return False
    with transaction() as session:
        locked = select(Operation).where(row.id == operation.id).with_for_update()
        current = session.scalars(locked).one()
        if current.undo_until is None:
            return True
        if not _is_late(current) or _is_worked_on(session, current):
            return False
        steps = restoring.withdrawn(session, current)
    for action, arguments in steps:
        getattr(recovery, action)(**arguments)
    return True


def _is_worked_on(session: Session, operation: Operation) -> bool:
    """Whether anything is queued or running on its server: it may be the undo."""
    row: Any = Operation
    query = select(row.id).where(
        row.server_id == operation.server_id, row.state.in_(("queued", "running"))
    )
    return session.scalars(query.limit(1)).first() is not None


def _folders(site: Site) -> list[Path]:
    """The directories of set-aside files, wherever this host's domains have, or had, disks or the
    state of a TPM."""
    files = site.disk_files()
    files |= {path for operation in _undoable(site) for path in _live(operation).values()}
    beside = {path.parent for path in files if not path.parent.name.startswith(setaside.FOLDER)}
    found = {each for folder in beside for each in folder.glob(f"{setaside.FOLDER}*")}
    found |= set(settings().swtpm.glob(f"*/*/{setaside.FOLDER}*"))
    return sorted(each for each in found if each.is_dir())


def _stray(site: Site, folder: Path) -> Iterator[Finding]:
    """A directory that its operation needs no more, or whose operation nobody knows."""
    operation_id = folder.name.removeprefix(setaside.FOLDER)
    known = _known(operation_id)
    if (known and (known.host != site.host or not _is_over(known))) or not folder.exists():
        return
    ended = (known.error or {}).get("code") if known else None
    if known is None or ended == errors.DatabaseRestored.code:
        detail = "the database knows no such operation" if known is None else "what it did is lost"
        remedy = "look whether old-… is a disk that you want back; if not, remove the directory"
        yield Finding(CHECK, str(folder), detail, remedy)
    elif obstacle := _obstacle(site, folder):
        yield Finding(CHECK, str(folder), *obstacle)
    else:
        yield Finding(
            CHECK,
            str(folder),
            f"operation {operation_id} has ended and cannot be undone any more",
            "--fix removes it; the disks in use stay",
            repair=lambda: _discarded(site, folder, operation_id),
        )


def _known(operation_id: str) -> Operation | None:
    row: Any = Operation
    with reading() as session:
        return session.scalars(select(Operation).where(row.id == operation_id)).one_or_none()


def _is_over(operation: Operation) -> bool:
    """Whether it has ended, promises nothing, and no other one is to clear up after it.

    The journal is asked after the row: the transaction that takes back the promise writes there
    that the files are to go.
    """
    if operation.finished_at is None or operation.undo:
        return False
    with reading() as session:
        return operation.id not in spoken_for(session, "operation_id")


def _obstacle(site: Site, folder: Path) -> tuple[str, str] | None:
    """What differs, and what a person must do, where the directory cannot just be removed."""
    strange = [each.name for each in folder.iterdir() if _live_name(each) is None]
    if strange:
        return (
            f"its time is over, and {', '.join(strange)} in it is not the operation's",
            "move that elsewhere if you need it, and run this again",
        )
    files = [each for each in folder.iterdir() if each.is_file()]
    if used := site.disks_in(folder) or [each.name for each in files if is_open(each)]:
        return (
            f"its time is over, and a domain uses {', '.join(used)} in it",
            "find out which one (`virsh domblklist`, `lslocks`), and give it a disk of its own",
        )
    return None


def _live_name(entry: Path) -> str | None:
    for start in (setaside.OLD, setaside.NEW):
        if entry.name.startswith(start) and not entry.is_dir():
            return entry.name.removeprefix(start)
    return None


def _discarded(site: Site, folder: Path, operation_id: str) -> bool:
    known = _known(operation_id)
    if not folder.is_dir():
        return True
    if known is None or not _is_over(known) or _obstacle(site, folder):
        return False
    names = {_live_name(each) for each in folder.iterdir()} or {"nothing"}
    live = {name: folder.parent / name for name in names if name}
    setaside.discard(live, operation_id)
    return True
