"""Copies in the vault against their rows and their own manifests.

What has no row, or has lost its folder, is the rescan's to judge. No copy is removed here.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import select

from shared.database import reading, transaction
from shared.doctor.findings import Finding
from shared.doctor.site import Site
from shared.manifest import VaultError, read_manifest
from shared.models import Image, Snapshot
from shared.rescan import Finding as Judged
from shared.rescan import rescan, survey
from shared.vault import Vault, wrong_files

CHECK = "copy"
_FILE, _FOLDER = 0o400, 0o700


class _NothingKept(Exception):
    """The rescan was only asked what it would do."""


def differences(site: Site) -> Iterator[Finding]:
    """Rows without folders and the other way round, damaged copies, file modes (S3)."""
    judged = _rescanned(site.vault, keep=False)
    busy, states = site.busy(), _states()
    expected = [each for each in judged if states.get(Path(each.path).name) == "complete"]
    if expected and all(each.verdict == "missing" for each in judged):
        yield _not_mounted(site, len(expected))
        return

    @cache
    def add_rows() -> bool:
        _rescanned(site.vault, keep=True)
        return True

    for each in judged:
        kind, server_id, copy_id = Path(each.path).parts
        if each.verdict == "under_way" or server_id in busy:
            continue
        with contextlib.suppress(FileNotFoundError):  # it is being deleted by now
            if each.verdict == "missing":
                yield from _missing(each, kind, states.get(copy_id), add_rows)
                continue
            yield from _misjudged(each, add_rows)
            if each.verdict not in ("deleted", "foreign", "incomplete"):
                state = "complete" if each.verdict == "adopted" else states.get(copy_id)
                yield from _damaged(site.vault, each, kind, state)
                yield from _loose(site, each.path)


def _rescanned(vault: Vault, *, keep: bool) -> list[Judged]:
    found: list[Judged] = []
    seen = survey(vault)
    try:
        with transaction() as session:
            found = rescan(session, vault, seen)
            if not keep:
                raise _NothingKept
    except _NothingKept:
        pass
    return found


def _states() -> dict[str, str]:
    """The state of each row, by the copy's id; a snapshot is always `complete`."""
    image: Any = Image
    snapshot: Any = Snapshot
    with reading() as session:
        images = session.execute(select(image.id, image.state).where(image.deleted_at.is_(None)))
        snapshots = session.scalars(select(snapshot.id).where(snapshot.deleted_at.is_(None)))
        return {**{row.id: row.state for row in images}, **dict.fromkeys(snapshots, "complete")}


def _not_mounted(site: Site, count: int) -> Finding:
    return Finding(
        CHECK,
        str(site.vault.root),
        f"the database knows {count} copies here and there is none",
        "mount the vault's file system; if the copies are gone for good, delete them with "
        "`triptych image delete` and `triptych snapshot delete`",
    )


def _missing(
    found: Judged, kind: str, state: str | None, mark: Callable[[], bool]
) -> Iterator[Finding]:
    if state == "missing":
        return  # as the database says
    if kind == "images":
        remedy = "--fix marks it missing, and nothing is restored from it until it is back"
        yield Finding(CHECK, found.path, "the image's folder is gone", remedy, repair=mark)
        return
    # Without its row the snapshot would not be found again, should only its folder have moved.
    remedy = "put the folder back, or delete the row with `triptych snapshot delete`"
    yield Finding(CHECK, found.path, "the snapshot's folder is gone", remedy)


def _misjudged(found: Judged, add_rows: Callable[[], bool]) -> Iterator[Finding]:
    """What the rescan says of a folder with a manifest."""
    match found.verdict:
        case "adopted":
            remedy = "--fix adds the row"
            yield Finding(CHECK, found.path, "it has no row", remedy, repair=add_rows)
        case "found_again":
            detail = "its row says that it is missing, and it is there"
            remedy = "--fix makes it usable again; verify it before you rely on it"
            yield Finding(CHECK, found.path, detail, remedy, repair=add_rows)
        case "incomplete":
            remedy = "it may be being copied back: `triptych-admin vault rescan` once it is whole"
            yield Finding(CHECK, found.path, found.detail, remedy)
        case "deleted":
            remedy = "if it is not needed any more, remove the folder"
            yield Finding(CHECK, found.path, found.detail.partition(";")[0], remedy)
        case "foreign":
            told, _, remedy = found.detail.partition("; ")
            yield Finding(CHECK, found.path, told, f"put it into its own host's vault. {remedy}")
        case "registered_anew":
            told, _, remedy = found.detail.partition("Nothing was changed; ")
            yield Finding(CHECK, found.path, told.rstrip(". "), remedy)
        case "conflict":
            remedy = "delete one of them: `triptych snapshot delete`, or remove this folder"
            yield Finding(CHECK, found.path, found.detail.partition(";")[0], remedy)


def _damaged(vault: Vault, found: Judged, kind: str, state: str | None) -> Iterator[Finding]:
    """`state` is that of the row, None without one."""
    faults = _faults(vault, found.path)
    if not faults or state == "damaged":
        return  # whole; or the database says so, and nothing is restored from it
    detail = "; ".join(faults)
    if state is None:
        remedy = "take from it what you need (docs/how-to/restore-without-triptych.md), remove it"
        yield Finding(CHECK, found.path, detail, remedy)
    elif kind == "images":
        remedy = "--fix marks it damaged, and nothing is restored from it until it passes a verify"
        yield Finding(
            CHECK, found.path, detail, remedy, repair=lambda: _mark_damaged(vault, found.path)
        )
    else:
        remedy = "put it back as it was, or delete it with `triptych snapshot delete`"
        yield Finding(CHECK, found.path, detail, remedy)


def _mark_damaged(vault: Vault, path: str) -> bool:
    if _faults(vault, path):  # still
        with transaction() as session:
            image = session.get(Image, Path(path).name)
            if image is not None:
                image.state = "damaged"
    return True


def _faults(vault: Vault, path: str) -> list[str]:
    """Where a copy's files are not what its manifest says; not what is in them."""
    folder = vault.root / path
    try:
        manifest = read_manifest(folder)
        faults = list(wrong_files(folder, manifest))
        if not vault.is_in_place(folder, manifest):
            faults.append(f"its manifest is that of {manifest.kind} {manifest.id}")
    except VaultError as error:
        faults = [" ".join(str(error.__cause__ or error).split())]
    return faults if folder.is_dir() else []  # else it was deleted in between


def _loose(site: Site, path: str) -> Iterator[Finding]:
    """Folders and files of a copy that have other modes than 0700 and 0400 (S3)."""
    folder = site.vault.root / path
    wrong = {each.name: mode for each, mode, _ in _modes(folder)}
    if not wrong:
        return
    listed = ", ".join(f"{name} {mode:04o}" for name, mode in sorted(wrong.items()))
    remedy = (
        "--fix makes the folder 0700 and its files 0400; verify an image, it could be written to"
    )
    yield Finding(CHECK, path, f"it is not closed: {listed}", remedy, repair=lambda: _close(folder))


def _modes(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Each entry with the mode that it has and the other one that it should have."""
    if not folder.is_dir():
        return
    # A name with a dot is a manifest that is being written anew.
    files = (each for each in folder.iterdir() if not each.name.startswith("."))
    for entry, wanted in ((folder, _FOLDER), *((each, _FILE) for each in files)):
        mode = entry.lstat().st_mode & 0o7777
        if mode != wanted and not entry.is_symlink() and (entry == folder or entry.is_file()):
            yield entry, mode, wanted


def _close(folder: Path) -> bool:
    for entry, _, wanted in _modes(folder):
        entry.chmod(wanted)
    return True
