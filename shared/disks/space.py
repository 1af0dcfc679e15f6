"""Refusing work that would fill a file system."""

import os
from collections.abc import Iterable
from pathlib import Path

from shared.disks.errors import InsufficientSpace

FLOOR = 0.05


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


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
