"""Refusing work that would fill a file system, before it begins and while it goes on."""

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from shared.disks.errors import InsufficientSpace

FLOOR = 0.05
LOOK_EVERY_S = 0.25
"""A disk that writes 1 GB/s takes a quarter of one meanwhile: less than the floor of 5 GB."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is (reserved blocks not counted)."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def ensure_space(path: Path, needed: int, floor: float = FLOOR) -> None:
    """Raise InsufficientSpace unless `needed` bytes fit and `floor` of the file system stays free.

    The floor is there because a full file system stops the guests that live on it.
    """
    stat = os.statvfs(path)
    kept = int(stat.f_blocks * stat.f_frsize * floor)
    free = stat.f_bavail * stat.f_frsize
    if free - needed < kept:
        raise InsufficientSpace(
            f"{_human(needed)} are needed at {path} and {_human(free)} are free, of which "
            f"{_human(kept)} are kept free. Nothing was copied; make room or copy less.",
            needed_bytes=needed,
            free_bytes=free,
            kept_free_bytes=kept,
        )


def ensure_space_for(needs: Iterable[tuple[Path, int]], floor: float = FLOOR) -> None:
    """`ensure_space` for several files at once, added up per file system."""
    sums: dict[int, tuple[Path, int]] = {}
    for folder, needed in needs:
        device = folder.stat().st_dev
        path, so_far = sums.get(device, (folder, 0))
        sums[device] = (path, so_far + needed)
    for path, needed in sums.values():
        ensure_space(path, needed, floor)


class FloorWatch:
    """Watches, while something is written to `path`, that `floor` of its file system stays free.

    What was measured before the start may not last: others write there too.
    """

    def __init__(self, path: Path, floor: float = FLOOR) -> None:
        self.path, self.floor = path, floor
        self._next = 0.0

    def check(self) -> None:
        """Raise InsufficientSpace where less is left. Cheap: looks a few times a second."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        stat = os.statvfs(self.path)
        kept = int(stat.f_blocks * stat.f_frsize * self.floor)
        free = stat.f_bavail * stat.f_frsize
        if free < kept:
            raise InsufficientSpace(
                f"Only {_human(free)} are left at {self.path}, less than the {_human(kept)} that "
                "are kept free, so the copy was stopped. Nothing of it was kept and what it was "
                "made from was not touched; make room and try again.",
                free_bytes=free,
                kept_free_bytes=kept,
            )


def says_full(complaint: str) -> bool:
    """Whether QEMU's or qemu-img's words are those of a full file system or quota."""
    return any(os.strerror(number) in complaint for number in _FULL)


@contextlib.contextmanager
def full_is_said(path: Path) -> Iterator[None]:
    """Raise InsufficientSpace where writing to `path` finds the file system, or a quota, full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InsufficientSpace(
            f"The file system of {path} became full. Nothing of what was being written was "
            "kept; make room and try again."
        ) from error


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
