"""Folders in the vault that are no copies: half-made, half-removed, sources of clones."""

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select

from shared.database import reading
from shared.doctor.findings import Finding
from shared.doctor.site import Site, spoken_for
from shared.hypervisor.locks import refuse_if_open
from shared.models import Image, Operation, Snapshot
from shared.vault import DELETING, PARTIAL, Vault

CHECK = "leftover"


def differences(site: Site) -> Iterator[Finding]:
    """What no unfinished operation has yet to keep or to remove."""
    vault = site.vault
    for folder in (*vault.partials(), *vault.leftovers(), *vault.copies("farm")):
        if _is_owned(vault, folder):
            continue
        name, copy = str(folder.relative_to(vault.root)), _copy(folder)
        if _has_row(copy.name) and not copy.exists():
            detail = f"the database still has {copy.name} as a copy"
            remedy = f"if its manifest.json is there, rename it to {copy.name}; else remove it"
            yield Finding(CHECK, name, detail, remedy)
            continue
        if used := site.disks_in(folder):
            detail = (
                f"no operation is at it any more, and a domain has {', '.join(used)} for a disk"
            )
            yield Finding(CHECK, name, detail, "give that a disk of its own, then run this again")
            continue
        yield Finding(
            CHECK,
            name,
            "no operation is at it any more",
            "--fix removes it",
            repair=lambda folder=folder: _removed(site, folder),  # type: ignore[misc]
        )


def _copy(folder: Path) -> Path:
    """The folder of the copy that this was to become, or was."""
    while folder.suffix in (PARTIAL, DELETING):
        folder = folder.with_suffix("")
    return folder


def _is_owned(vault: Vault, folder: Path) -> bool:
    """Whether an unfinished operation clears it up, or it is gone by now."""
    copy = _copy(folder)
    with reading() as session:
        if copy.parent.parent.name == "farms":
            query = select(Operation).where(Operation.id == copy.name)  # type: ignore[arg-type]
            operation = session.scalars(query).one_or_none()
            if operation and operation.finished_at is None:
                return True  # of which each attempt has the same folder
        if copy in map(vault.here, spoken_for(session, "folder")):
            return True
    return not folder.exists()


def _has_row(copy_id: str) -> bool:
    with reading() as session:
        rows = (session.get(Image, copy_id), session.get(Snapshot, copy_id))
        return any(row is not None and row.deleted_at is None for row in rows)


def _removed(site: Site, folder: Path) -> bool:
    if _is_owned(site.vault, folder) or site.disks_in(folder):
        return not folder.exists()
    # A copy job that was ended a moment ago lets go of its files a little later.
    refuse_if_open((each for each in folder.iterdir() if each.is_file()), "removed")
    site.vault.remove(folder, others_at_work=True)
    return True
