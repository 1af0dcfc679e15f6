"""`triptych-admin vault rescan`: rows for what this host's vault holds, from the folders alone.

For a database that was lost, or restored from a backup that is older than the copies. It adds
rows and changes none but an image's that has no folder (it is `missing`) or has got it back, and a
forgotten server's that has a snapshot (it is registered again); it touches no file. What it does
not do it says: a folder that explains nothing, or whose place in the database is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlmodel import Session

from shared import events, lookups
from shared.copying import Stored
from shared.database import now
from shared.manifest import Manifest, VaultError, read_manifest
from shared.models import Image, JournalEntry, Server, Snapshot
from shared.settings import settings
from shared.vault import Vault, wrong_files


@dataclass(frozen=True)
class Finding:
    """What was found about one copy. `verdict`: adopted · known · deleted · under_way · missing ·
    found_again · incomplete · conflict · registered_anew · foreign · unreadable."""

    path: str
    verdict: str
    detail: str = ""


UNDER_WAY = "an operation is making or removing it"


@dataclass(frozen=True)
class Seen:
    """A copy's folder, and its manifest or why there is none; what its files lack."""

    folder: Path
    manifest: Manifest | None
    obstacle: str = ""
    faults: tuple[str, ...] = ()


def survey(vault: Vault) -> list[Seen]:
    """What is in the vault; read before `rescan`, whose transaction may keep all others waiting."""
    seen = []
    for folder in vault.copies():
        if folder.parent.parent.name == "farms":
            continue  # of an operation, and gone with it
        try:
            manifest = read_manifest(folder)
            if not vault.is_in_place(folder, manifest):
                raise VaultError(f"its manifest says {manifest.kind} {manifest.id}")
        except VaultError as error:
            seen.append(Seen(folder, None, error.detail))
        else:
            seen.append(Seen(folder, manifest, faults=_faults(folder, manifest)))
    return seen


def _faults(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    try:
        return tuple(wrong_files(folder, manifest))
    except OSError as error:
        return (str(error),)


def rescan(session: Session, vault: Vault, seen: Sequence[Seen]) -> list[Finding]:
    """Compare what was seen with the rows of this host, and add what has none; see the module."""
    lookups.reporting_host(session, settings().host)
    # Asked before its row is: an operation's last transaction adds that and ends this.
    under_way = _under_way(session, vault)
    found = []
    for each in seen:
        name = str(each.folder.relative_to(vault.root))
        if each.folder in under_way:
            found.append(Finding(name, "under_way", UNDER_WAY))
        elif not each.folder.is_dir():
            continue  # removed since
        elif each.manifest is None:
            found.append(Finding(name, "unreadable", each.obstacle))
        else:
            verdict, detail = _judged(session, each.manifest, "; ".join(each.faults))
            if verdict == "deleted" and each.folder in _under_way(session, vault):  # since then
                verdict, detail = "under_way", UNDER_WAY
            found.append(Finding(name, verdict, detail))
    return [*found, *_missing(session, vault)]


def _under_way(session: Session, vault: Vault) -> set[Path]:
    """Folders that an unfinished operation has yet to keep or to remove."""
    query = select(JournalEntry).where(JournalEntry.action == "remove_copy")  # type: ignore[arg-type]
    return {vault.here(entry.arguments["folder"]) for entry in session.scalars(query)}


def _judged(session: Session, manifest: Manifest, faults: str) -> tuple[str, str]:
    server = session.get(Server, manifest.server.id)
    if server and server.host != settings().host:
        return "foreign", (
            f"it is of host {server.host}, which looks for it in its own vault; if this host takes "
            "that one's place, give it that name (TRIPTYCH_HOST)"
        )
    row: Any = session.get(Snapshot if manifest.kind == "snapshot" else Image, manifest.id)
    if row is None:
        return ("incomplete", faults) if faults else _adopted(session, Stored(manifest))
    if row.deleted_at:
        return "deleted", f"it was deleted at {row.deleted_at:%Y-%m-%d %H:%M} UTC; remove it"
    if getattr(row, "state", "") == "missing":
        if faults:  # rotation would count it as a good one
            return "incomplete", faults
        row.state = "damaged" if row.verified_result == "damaged" else "complete"
        return "found_again", "verify it before you rely on it"
    return "known", ""


def _adopted(session: Session, stored: Stored) -> tuple[str, str]:
    manifest = stored.manifest
    registered = _registered(session, manifest)
    if manifest.kind == "snapshot" and registered and registered.id != manifest.server.id:
        return "registered_anew", (
            f"its server was registered anew, as {registered.name} ({registered.id}), which has no "
            f"part in it. Nothing was changed; `triptych server forget {registered.name}`, and "
            "scan again: then it is that server's"
        )
    server = _server(session, manifest, registered)
    row: Snapshot | Image
    if manifest.kind == "snapshot":
        taken = _one(session, Snapshot, server_id=server.id)
        if taken:
            return "conflict", f"the server has another snapshot, {taken.id}; delete one of them"
        row = stored.snapshot_row()
        if row.expires_at <= now():  # it may be all that is left: somebody is to look first
            row.expires_at = now() + settings().snapshot_retention
    else:
        row = stored.image_row()
        if _one(session, Image, server_id=server.id, name=row.name):
            row.name = f"{row.name[:50]}-{row.id[-8:]}"
    session.add(row)
    session.flush()
    events.emit(session, f"{manifest.kind}.adopted", server.id, **{manifest.kind: row.id})
    return "adopted", "as a forgotten server's" if server.forgotten_at else ""


def _registered(session: Session, manifest: Manifest) -> Server | None:
    """The server that the copy's domain is registered as."""
    row: Any = Server
    active = (row.host == settings().host, row.forgotten_at.is_(None))
    same = select(Server).where(*active, row.domain_uuid == manifest.server.uuid)
    return session.scalars(same).first()


def _server(session: Session, manifest: Manifest, registered: Server | None) -> Server:
    """The copy's server; one that is not known is added, forgotten if its domain is another's.

    A forgotten one's images are to be had all the same, its snapshot is not: for that it is
    registered again.
    """
    about = manifest.server
    server = session.get(Server, about.id)
    if server is None:
        server = Server(id=about.id, name=about.name, host=settings().host, domain_uuid=about.uuid)
        server.forgotten_at = now() if registered else None
        session.add(server)
    elif manifest.kind == "snapshot":
        server.forgotten_at = None
    session.flush()
    return server


def _one(session: Session, model: Any, **values: Any) -> Any:
    query = select(model).filter_by(**values).where(model.deleted_at.is_(None))
    return session.scalars(query).first()


def _missing(session: Session, vault: Vault) -> Iterator[Finding]:
    """Rows of this host whose folder is not there."""
    for kind, model in (("snapshot", Snapshot), ("image", Image)):
        row: Any = model
        query = select(row).join(Server, Server.id == row.server_id)
        here = query.where(Server.host == settings().host, row.deleted_at.is_(None))  # type: ignore[arg-type]
        for each in session.scalars(here):
            folder: Path = vault.folder(kind, each.server_id, each.id)  # type: ignore[arg-type]
            if folder.is_dir():
                continue
            detail = f"row {each.id} has no folder; delete the {kind}"
            if kind == "image":
                each.state = "missing"
            yield Finding(str(folder.relative_to(vault.root)), "missing", detail)
