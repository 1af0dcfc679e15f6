"""The bases that linked clones stand on: those that are gone, and those that nobody stands on.

A base goes with its last clone. One that is left may be what a disk stands on that is not ours
to know, so that it is never removed here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select

from shared.database import reading
from shared.disks.overlays import BASE_PREFIX
from shared.doctor.findings import Finding
from shared.doctor.site import Site, spoken_for
from shared.linked import set_aside_on
from shared.models import Clone
from shared.settings import settings

CHECK = "base"


def differences(site: Site) -> Iterator[Finding]:
    there = _there(site)
    clones = _linked(site)
    for clone in clones:
        for path in clone.linked_to:
            if Path(path).exists():
                continue
            yield Finding(
                CHECK,
                f"{clone.name} ({clone.id})",
                f"its disk stands on {path}, which is gone",
                "bring that very file back, from wherever it was moved to; else restore one of "
                "the clone's images",
            )
    known = {path for clone in clones for path in clone.linked_to}
    with reading() as session:
        known |= spoken_for(session, "path") | set_aside_on(session)
    for path in sorted(there - known):
        yield Finding(
            CHECK,
            path,
            "no clone that is known stands on it",
            "remove it if no disk beside it does either (`qemu-img info --backing-chain DISK`)",
        )


def _there(site: Site) -> set[str]:
    """The bases in the directories where clones' disks go."""
    folders = {path.parent for path in site.disk_files()} | {settings().clone_dir}
    return {
        str(path)
        for folder in folders
        if folder and folder.is_dir()
        for path in folder.glob(f"{BASE_PREFIX}*")
    }


def _linked(site: Site) -> list[Clone]:
    row: Any = Clone
    with reading() as session:
        query = select(Clone).where(row.host == site.host, row.state == "ready").order_by(row.id)
        return [each for each in session.scalars(query) if each.linked_to]
