"""Removing a server's files for good: first aside by rename, gone only when that is committed.

Beside each file stands `.triptych-<operation>/` with `gone-<name>`. Every function may be called
again after a crash at any point of itself, and touches the files that it is given alone.
"""

import contextlib
import stat
from collections.abc import Iterable
from pathlib import Path

from shared import faults
from shared.disks.errors import SetAsideConflict
from shared.disks.setaside import folder_of, sync_folder
from shared.disks.space import full_is_said

GONE = "gone-"


def gone_path(path: Path, operation_id: str) -> Path:
    return folder_of(path, operation_id) / f"{GONE}{path.name}"


def is_plain(path: Path) -> bool:
    """Whether there is a file of that name, and no link, directory or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def set_aside(files: Iterable[Path], operation_id: str) -> None:
    """Take the files from under their names. Those that are gone have no need of it.

    Raises InsufficientSpace where not even a name can be written; `give_back` undoes what was
    done by then.
    """
    for path in files:
        if not is_plain(path):
            continue
        gone = gone_path(path, operation_id)
        with full_is_said(path.parent):
            gone.parent.mkdir(mode=0o700, exist_ok=True)
            path.rename(gone)
        faults.point("removal:aside")
        sync_folder(gone.parent)
        sync_folder(path.parent)


def give_back(files: Iterable[Path], operation_id: str) -> None:
    """Put back what was set aside. Raises SetAsideConflict for a name that is taken by now."""
    for path in files:
        gone = gone_path(path, operation_id)
        if gone.exists():
            if path.exists():
                raise SetAsideConflict(
                    f"{path} was made by somebody while it was set aside at {gone}. Move one of "
                    "the two elsewhere; then the other is put back."
                )
            gone.rename(path)
            sync_folder(path.parent)
        _remove_if_empty(gone.parent)


def discard(files: Iterable[Path], operation_id: str, kept: Iterable[Path] = ()) -> None:
    """Remove what was set aside, and what others had `kept` beside it, by its own path."""
    for path in (*(gone_path(each, operation_id) for each in files), *kept):
        path.unlink(missing_ok=True)
        faults.point("removal:unlinked")
        _remove_if_empty(path.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, or another's files are in it
        folder.rmdir()
        sync_folder(folder.parent)
