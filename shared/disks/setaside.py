"""The file half of revert and restore: new files in, old files set aside, and back.

Beside each live file stands `.triptych-<operation>/` with `new-<name>` (prepared)
and `old-<name>` (set aside). Every function may be called again after a crash at
any point of itself: the names alone tell how far it came. There is a file under
the live name at every instant, since the old one is linked aside before the new
one is renamed over it.

The domain must be off during `swap` and `swap_back`.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from shared import faults
from shared.disks.durable import sync
from shared.disks.errors import DiskError, SetAsideConflict
from shared.disks.space import full_is_said

FOLDER, NEW, OLD = ".triptych-", "new-", "old-"
"""What the names of directories and files begin with, before the operation's or the live one's."""


def folder_of(live: Path, operation_id: str) -> Path:
    """The hidden directory beside `live` that belongs to this operation."""
    if "/" in operation_id or not operation_id:
        raise ValueError(operation_id)
    return live.parent / f"{FOLDER}{operation_id}"


def new_path(live: Path, operation_id: str) -> Path:
    return folder_of(live, operation_id) / f"{NEW}{live.name}"


def old_path(live: Path, operation_id: str) -> Path:
    return folder_of(live, operation_id) / f"{OLD}{live.name}"


def prepare(live: Mapping[str, Path], operation_id: str) -> dict[str, Path]:
    """Make the directories; returns where each disk's new file is to be written.

    A `new-` file that an earlier attempt left is removed, unless it is in use
    already (its `old-` is there): that is a conflict. Symbolic links are
    resolved by the caller. Raises SetAsideConflict, InsufficientSpace, DiskError for a
    block device.
    """
    paths = {}
    for target, path in live.items():
        if path.exists() and not stat.S_ISREG(path.lstat().st_mode):
            raise no_plain_file(target, path)
        if _swapped(path, old_path(path, operation_id)):
            raise SetAsideConflict(f"{target} was already replaced by this operation.")
        folder = folder_of(path, operation_id)
        with full_is_said(path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        paths[target] = new_path(path, operation_id)
        paths[target].unlink(missing_ok=True)
        old_path(path, operation_id).unlink(missing_ok=True)  # a second name, no more
    return paths


def no_plain_file(target: str, path: Path) -> DiskError:
    return DiskError(
        f"{target} is {path}, which is no plain file, so it cannot be replaced as a whole. Nothing "
        "was changed; restore it by hand, or clone the copy instead."
    )


def swap(live: Mapping[str, Path], operation_id: str) -> None:
    """Put every new file in place of its live one, which is set aside.

    The names change one right after the other: a host that loses its power between two, and
    starts the server by itself, would start it on disks of two instants. The new file gets the
    live one's owner and mode. A live file that is gone (a restore of a lost disk) has nothing to
    set aside. Raises SetAsideConflict when a new file is missing; nothing is changed then. Raises
    InsufficientSpace where not even a name can be written; `swap_back` undoes what was done by
    then.
    """
    for target, path in live.items():
        new, old = new_path(path, operation_id), old_path(path, operation_id)
        if not new.exists() and not _swapped(path, old):
            raise SetAsideConflict(
                f"The new file for {target} is missing at {new}; nothing was changed."
            )
    to_do = [path for path in live.values() if new_path(path, operation_id).exists()]
    for path in to_do:  # the others an earlier attempt has done
        new, old = new_path(path, operation_id), old_path(path, operation_id)
        with full_is_said(path.parent):
            if path.exists() and not old.exists():
                _take_over_owner(path, new)
                _link(path, old)
                sync_folder(old.parent)
        faults.point("swap:linked")
    for path in to_do:
        with full_is_said(path.parent):
            new_path(path, operation_id).replace(path)
        faults.point("swap:replaced")
    _sync_all(live.values(), operation_id)


def is_brought(path: Path, operation_id: str) -> bool:
    """Whether what was prepared is live, for a file that had nothing before it.

    What somebody else put there is not, before it was prepared or while it is.
    """
    prepared = folder_of(path, operation_id).is_dir()
    return prepared and path.exists() and not new_path(path, operation_id).exists()


def refuse_lost(live: Mapping[str, Path], operation_id: str) -> None:
    """Raise SetAsideConflict where an old file is gone: the others are of another instant."""
    lost = sorted(
        target for target, path in live.items() if not old_path(path, operation_id).exists()
    )
    if lost:
        folders = {str(folder_of(live[target], operation_id)) for target in lost}
        raise SetAsideConflict(
            f"What was set aside of {', '.join(lost)} is gone from {', '.join(sorted(folders))}: "
            "disks of two instants would come together. Nothing was changed; put it back, or "
            "restore an image."
        )


def swap_back(live: Mapping[str, Path], operation_id: str) -> None:
    """Put every old file back under its live name; the new one is kept as `new-`.

    Whatever point `swap`, or an earlier `swap_back`, died at, the old files are
    live afterwards. Nothing happens to a disk that was not swapped.
    """
    to_do = [path for path in live.values() if old_path(path, operation_id).exists()]
    swapped_now = []
    for path in to_do:
        new, old = new_path(path, operation_id), old_path(path, operation_id)
        if path.exists() and path.samefile(old):
            old.unlink()  # rename does nothing between two names of one file
            continue
        if path.exists() and not new.exists():
            _take_over_owner(old, path)
            _link(path, new)
            sync_folder(new.parent)
        swapped_now.append(path)
        faults.point("swap_back:linked")
    for path in swapped_now:
        old_path(path, operation_id).replace(path)
        faults.point("swap_back:replaced")
    _sync_all(live.values(), operation_id)


def take_away(live: Mapping[str, Path], operation_id: str) -> None:
    """Take files that had nothing before them from under their live names; kept as `new-`."""
    for path in live.values():
        new = new_path(path, operation_id)
        if path.exists() and not new.exists():
            path.rename(new)
            sync_folder(path.parent)
            sync_folder(new.parent)


def swapped(live: Mapping[str, Path], operation_id: str) -> dict[str, Path]:
    """Those of the live files whose old one is set aside."""
    return {
        target: path
        for target, path in live.items()
        if _swapped(path, old_path(path, operation_id))
    }


def discard(live: Mapping[str, Path], operation_id: str) -> None:
    """Remove the directories with what is in them. The live files stay as they are.

    An old file whose live name is gone is the disk itself: it is put back first.
    """
    for path in live.values():
        old = old_path(path, operation_id)
        if old.exists() and not path.exists():
            old.replace(path)
            sync_folder(path.parent)
    for folder in {folder_of(path, operation_id) for path in live.values()}:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        sync_folder(folder.parent)


def note_of(live: Mapping[str, Path], operation_id: str) -> Path:
    """A file that says, while it is there, in what state the domain is to be started again."""
    return folder_of(next(iter(live.values())), operation_id) / "started"


def write_note(note: Path, text: str) -> None:
    note.write_text(text)
    sync(note)
    sync(note.parent)


def _swapped(path: Path, old: Path) -> bool:
    return old.exists() and not (path.exists() and path.samefile(old))


def _link(path: Path, name: Path) -> None:
    """A second name for a file; where the file system has no hard links, the only one."""
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        path.replace(name)


def _take_over_owner(of: Path, to: Path) -> None:
    status = of.stat()
    os.chown(to, status.st_uid, status.st_gid)
    to.chmod(stat.S_IMODE(status.st_mode))


def _sync_all(paths: Iterable[Path], operation_id: str) -> None:
    for folder in {each for path in paths for each in (path.parent, folder_of(path, operation_id))}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last. It may be gone."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
