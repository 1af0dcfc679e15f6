"""Owns looking into the disk of a guest that is not running, and changing it, without a mount.

Everything reads a raw copy on which ext4's journal was replayed first, as the next boot would.
QEMU's image locks hold: a disk that a running guest writes to is refused.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a checker found: `clean`, and its words."""

    clean: bool
    text: str


def info(disk: Path) -> dict[str, Any]:
    """What `qemu-img info` tells about `disk`: format, virtual-size, backing-filename, ..."""
    done = _run("qemu-img", "info", "--force-share", "--output=json", str(disk))
    return dict(json.loads(done.stdout))


def read_file(disk: Path, path: str) -> str:
    """The text of the file `path` in the ext4 file system on `disk`.

    Raises FileNotFoundError if it has none.
    """
    with _replayed_copy(disk) as raw, tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        _debugfs(raw, f'dump "{path}" {target}')
        if not target.exists():
            raise FileNotFoundError(f"{disk} holds no {path}")
        return target.read_text()


def write_file(disk: Path, path: str, text: str) -> None:
    """Write `text` to `path` (its folder must exist) on `disk`, in place.

    The disk keeps its format, owner and backing file.
    """
    with _replayed_copy(disk) as raw, tempfile.NamedTemporaryFile("w") as source:
        source.write(text)
        source.flush()
        _debugfs(raw, f'rm "{path}"', writable=True)
        _debugfs(raw, f'write {source.name} "{path}"', writable=True)
        disk_format = info(disk)["format"]
        _run("qemu-img", "convert", "-n", "-f", "raw", "-O", disk_format, str(raw), str(disk))
    if read_file(disk, path) != text:
        raise OSError(f"could not write {path} to {disk}; is there such a folder?")


def fsck(disk: Path) -> Verdict:
    """Whether the ext4 file system on `disk` is sound once its journal is replayed."""
    with _replayed_copy(disk) as raw:
        done = _run("e2fsck", "-f", "-n", str(raw), may_fail=True)
    return Verdict(done.returncode == 0, done.stdout + done.stderr)


def check(disk: Path) -> Verdict:
    """Whether `qemu-img check` finds `disk` whole; a format it cannot check counts as whole."""
    done = _run("qemu-img", "check", str(disk), may_fail=True)
    return Verdict(done.returncode in (0, 63), done.stdout + done.stderr)


@contextlib.contextmanager
def _replayed_copy(disk: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="triptych-lab-probe-") as folder:
        raw = Path(folder) / "disk.raw"
        _run("qemu-img", "convert", "-O", "raw", str(disk), str(raw))
        _run("e2fsck", "-y", "-E", "journal_only", str(raw), may_fail=True)
        yield raw


def _debugfs(raw: Path, request: str, *, writable: bool = False) -> None:
    _run("debugfs", *(["-w"] if writable else []), "-R", request, str(raw))


def _run(*command: str, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done
