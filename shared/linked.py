"""What linked clones stand on: what their rows say of it, and when it is nobody's any more.

The truth is in the images' own headers. A revert or a restore puts whole disks in their place; the
overlays that it sets aside stand on the base still, for as long as that can be undone. Making a
base and what is on it is the cloner's.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import String, cast, select
from sqlmodel import Session

from shared.database import reading
from shared.disks import images
from shared.disks.errors import CopyFailed
from shared.hypervisor.definition import DomainDefinition
from shared.models import Clone, Operation
from shared.operations.journal import Step

STOOD_ON = "linked_to"
"""In what an operation keeps for its undo: the bases that the disks which it set aside stand on."""


@dataclass(frozen=True)
class Links:
    """The files that a clone's disks stand on: before its disks were replaced, and now."""

    clone_id: str
    was: list[str]
    now: list[str]

    def write(self, session: Session) -> None:
        if clone := session.get(Clone, self.clone_id):
            clone.linked_to = self.now


def clone_of(server_id: str) -> Clone | None:
    """The clone that the server is, or was until it was forgotten and registered as a server of
    its own: its disks are the same."""
    row: Any = Clone
    with reading() as session:
        query = select(Clone).where(row.server_id == server_id).order_by(row.id.desc())
        return session.scalars(query).first()


def links_of(clone: Clone | None, definition: str, before: Sequence[str] = ()) -> Links | None:
    """What a clone of that definition stands on, as its files are now; None if it is no linked one.

    `before` is what it stood on once.
    """
    if clone is None or not (clone.linked_to or before):
        return None
    files = {path: "qcow2" for path in clone.files or [] if _is_qcow2(Path(path))}
    disks = DomainDefinition.parse(definition).disks
    files |= {disk.path: disk.format for disk in disks if disk.path}
    candidates = list(dict.fromkeys([*clone.linked_to, *before]))
    return Links(clone.id, clone.linked_to, still_under(files, candidates))


def still_under(files: Mapping[str, str], candidates: Sequence[str]) -> list[str]:
    """Those of the candidates that one of the files, given with their formats, depends on; all of
    them where that cannot be read."""
    found: set[Path] = set()
    for path, image_format in files.items():
        if image_format == "raw" or not Path(path).is_file():
            continue
        try:
            found |= {each.resolve() for each in images.chain(Path(path), image_format)}
        except (CopyFailed, OSError):
            return list(candidates)
    return [each for each in candidates if Path(each).resolve() in found]


def left_on(base: Path) -> list[str]:
    """The disks that stand on a base still, of clones that are deleted: the clone's own, which its
    owner moved or put another disk on, and those that its domain got later."""
    row: Any = Clone
    stood_there = cast(row.linked_to, String).contains(base.name, autoescape=True)
    with reading() as session:
        files = session.scalars(select(row.files).where(row.state == "deleted", stood_there))
        there = [path for each in files for path in each or [] if _is_qcow2(Path(path))]
    return [path for path in there if still_under({path: "qcow2"}, [str(base)])]


def _is_qcow2(path: Path) -> bool:
    """By its first bytes: what else begins so only keeps a base that could go."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"QFI\xfb"
    return False


def release(session: Session, clones: Sequence[Clone], paths: Iterable[str]) -> list[str]:
    """Those of the bases of these clones' farms that nobody stands on any more.

    For the transaction that marks clones deleted, or drops what could be undone, after it has; to
    be removed after it, and after their disks. A VM that was a clone, and was forgotten, is none
    that is known here: it may stand on one still.
    """
    wanted = set(paths)
    if not wanted:
        return []
    operation: Any = Operation
    row: Any = Clone
    farms = sorted({clone.operation_id for clone in clones})
    for farm in farms:
        # Of two who remove the last two clones at once, the second sees what the first did.
        session.execute(select(operation.seq).where(operation.id == farm).with_for_update())
    ready = select(Clone).where(row.operation_id.in_(farms), row.state == "ready")
    left = {path for clone in session.scalars(ready) for path in clone.linked_to}
    return sorted(wanted - left - set_aside_on(session))


def set_aside_on(session: Session) -> set[str]:
    """The bases that disks stand on which an undo would put back."""
    row: Any = Operation
    kept = select(row.undo).where(row.undo_until.is_not(None))
    return {path for undo in session.scalars(kept) for path in (undo or {}).get(STOOD_ON, ())}


def release_dropped(session: Session, server_id: str, paths: Sequence[str]) -> list[Step]:
    """What removes bases that were kept for the sake of an undo alone, which nobody can ask for
    any more; `paths` are those that it kept."""
    row: Any = Clone
    query = select(Clone).where(row.server_id == server_id).order_by(row.id.desc())
    clones = list(session.scalars(query))
    return [("remove_base", {"path": each}) for each in release(session, clones, paths)]
