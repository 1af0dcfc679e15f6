"""Owns finding processes: by what they have open, by their parents, and whether they are gone."""

from __future__ import annotations

import contextlib
from pathlib import Path


def holder_of(path: Path) -> int | None:
    """The pid of a process that has the file open, deleted or not; None if there is none.

    `Path.glob` fails for a process that ends while its files are listed.
    """
    wanted = (str(path), f"{path} (deleted)")
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                for each in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(each.readlink()) in wanted:
                            return int(process.name)
    return None


def children_of(pid: int, that: str = "") -> list[int]:
    """The pids of a process's children, of those whose command line has that word."""
    found = []
    with contextlib.suppress(OSError):  # one of them ends just now
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                if that in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(child)
    return found


def is_gone(pid: int) -> bool:
    """Whether the process has ended, though nobody may have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
