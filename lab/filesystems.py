"""Owns throw-away file systems on loop devices: XFS with reflinks, btrfs and ext4.

They are mounted below one directory of this process, which is a *shared* mount of its own:
a libvirtd that the lab starts in a private mount namespace sees what is mounted there, before
its start or after, and lets go of it when it is unmounted here. On machines whose `/` is
mounted private (containers, minimal VMs) it would see no other later mount.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

MIB = 1024 * 1024
GIB = 1024 * MIB
#: The smallest XFS and btrfs that their mkfs makes without being forced.
XFS_MINIMUM = 300 * MIB
BTRFS_MINIMUM = 128 * MIB
_CAP_SYS_ADMIN = 21

_root: Path | None = None


@cache
def can_mount() -> bool:
    """Tell whether this process may mount a loop device (root in a container may not)."""
    if os.geteuid() != 0 or not has_sys_admin():
        return False
    try:
        with ext4(16 * MIB):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def has_sys_admin() -> bool:
    """Tell whether this process holds CAP_SYS_ADMIN."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1)


def mount_root() -> Path:
    """Give the directory below which this process mounts; make it, shared, at first use."""
    global _root
    if _root is None:
        root = Path(tempfile.mkdtemp(prefix="triptych-lab-mnt-"))
        root.chmod(0o755)
        _run("mount", "--bind", str(root), str(root))
        _run("mount", "--make-private", str(root))
        _run("mount", "--make-shared", str(root))
        owner = os.getpid()
        atexit.register(_remove_root, root, owner)
        _root = root
    return _root


@contextlib.contextmanager
def xfs(size: int = 2 * GIB) -> Iterator[Path]:
    """Mount a new XFS with reflinks of `size` bytes (300 MiB at least); yield its directory."""
    if size < XFS_MINIMUM:
        raise ValueError(f"mkfs.xfs makes no file system below {XFS_MINIMUM} bytes, not {size}")
    with _mounted(size, ["mkfs.xfs", "-q", "-m", "reflink=1"]) as directory:
        yield directory


@contextlib.contextmanager
def btrfs(size: int = 2 * GIB) -> Iterator[Path]:
    """Mount a new btrfs of `size` bytes (128 MiB at least); yield its directory."""
    if size < BTRFS_MINIMUM:
        raise ValueError(f"mkfs.btrfs makes no file system below {BTRFS_MINIMUM} bytes, not {size}")
    with _mounted(size, ["mkfs.btrfs", "-q"]) as directory:
        yield directory


@contextlib.contextmanager
def ext4(size: int = 2 * GIB, *, direct: bool = False) -> Iterator[Path]:
    """Mount a new ext4 (no reflinks) of `size` bytes; yield its directory.

    What is written to a `direct` one is as fast as the disk, not as the cache of its backing file.
    """
    with _mounted(size, ["mkfs.ext4", "-q", "-m", "0"], direct=direct) as directory:
        yield directory


@contextlib.contextmanager
def tmpfs(inodes: int) -> Iterator[Path]:
    """Mount a new tmpfs that holds `inodes` names, its own root among them; yield its directory."""
    directory = Path(tempfile.mkdtemp(prefix="tmpfs-", dir=mount_root()))
    try:
        _run("mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes},size=16m", "none", str(directory))
        try:
            yield directory
        finally:
            unmount(directory)
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


def size(folder: Path) -> int:
    """The bytes that the file system of `folder` has in all."""
    return shutil.disk_usage(folder).total


def fill(folder: Path, leave: int = 0, *, crumbs: int = MIB) -> Path:
    """Take up all room in `folder` but `leave` bytes, and what is less than `crumbs`; delete the
    file to give it back."""
    path = folder / "ballast"
    done, step = 0, GIB
    with path.open("wb") as file:
        while step >= crumbs:
            if shutil.disk_usage(folder).free - step < leave:
                step //= 2
                continue
            try:
                os.posix_fallocate(file.fileno(), done, step)
                done += step
            except OSError:
                step //= 2
    return path


@contextlib.contextmanager
def _mounted(size: int, mkfs: list[str], *, direct: bool = False) -> Iterator[Path]:
    root = mount_root()
    handle, name = tempfile.mkstemp(prefix="triptych-lab-", suffix=".img")
    backing = Path(name)
    directory = Path(tempfile.mkdtemp(prefix=mkfs[0].removeprefix("mkfs.") + "-", dir=root))
    try:
        os.truncate(handle, size)
        os.close(handle)
        _run(*mkfs, str(backing))
        _run("mount", "-o", "loop", str(backing), str(directory))
        if direct:
            _run("losetup", "--direct-io=on", _device(directory))
        # QEMU's user must be able to walk through.
        directory.chmod(0o755)
        with contextlib.suppress(OSError):
            (directory / "lost+found").rmdir()
        try:
            yield directory
        finally:
            unmount(directory)
    finally:
        backing.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()


def _device(directory: Path) -> str:
    """The loop device that is mounted there."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, place, *_ = line.split()
        if place == str(directory):
            return device
    raise OSError(f"nothing is mounted at {directory}")


def unmount(directory: Path, patience_s: float = 5.0) -> None:
    """Unmount `directory`; one that stays busy is detached, and freed when its user lets go."""
    deadline = time.monotonic() + patience_s
    command = ["umount", str(directory)]
    while (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        if "not mounted" in done.stderr:
            return
        if time.monotonic() > deadline:
            _run("umount", "--lazy", str(directory))
            return
        time.sleep(0.1)


def _remove_root(root: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that made it
        return
    for left_over in root.iterdir():
        unmount(left_over, patience_s=1)
        with contextlib.suppress(OSError):
            left_over.rmdir()
    unmount(root, patience_s=1)
    with contextlib.suppress(OSError):
        root.rmdir()


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed; scripts/setup installs it")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
