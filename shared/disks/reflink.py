"""Copies that share extents: FICLONE and what it needs around it.

Owns: the ioctls. A reflinked file is a full file of its own; a block is copied
when either side writes it. Cost is per extent (about 19 µs), not per byte.
"""

import contextlib
import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.disks.errors import CopyFailed, InsufficientSpace, ReflinkRefused
from shared.disks.extents import Ranges
from shared.disks.space import full_is_said

FICLONE = 0x40049409  # include/uapi/linux/fs.h
FICLONERANGE = 0x4020940D
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_NOCOW_FL = 0x00800000

SHARE_COST_MS = 0.02
"""Measured: what FICLONE takes per extent, about."""
_RANGE = struct.Struct("=qQQQ")  # struct file_clone_range

# What file systems answer when they cannot share these two files' extents.
_CANNOT = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS}

_shares: set[tuple[tuple[int, int], tuple[int, int]]] = set()
"""Pairs of file systems that were seen to share extents."""


def reflink(src: Path, dst: Path) -> None:
    """Make `dst`, a new file of mode 0600, share all of `src`'s extents; synced.

    Raises FileExistsError, ReflinkRefused (use another way) or InsufficientSpace;
    nothing of `dst` is left then. Dirty pages of `src` are written out first,
    which takes as long as the disk needs.
    """
    source = os.open(src, os.O_RDONLY)
    try:
        target = create_target(source, dst)
        try:
            with full_is_said(dst.parent):
                os.fdatasync(source)
                clone_into_fd(source, target)
                os.fsync(target)
        except BaseException:
            dst.unlink(missing_ok=True)
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)


def create_target(src_fd: int, dst: Path) -> int:
    """A new empty file, mode 0600, that `src_fd` can be cloned into; its descriptor.

    On btrfs a file with the NOCOW attribute clones only into one that has it
    too, and the other way round (EINVAL otherwise; measured); it can be set on
    an empty file alone. Raises FileExistsError and InsufficientSpace.
    """
    with full_is_said(dst.parent):
        target = os.open(dst, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(target, 0o600)
        _take_over_nocow(src_fd, target)
    except BaseException:
        os.close(target)
        dst.unlink(missing_ok=True)
        raise
    return target


def clone_into_fd(src_fd: int, dst_fd: int) -> None:
    """FICLONE between open files: what belongs inside a pause. Not synced.

    Raises ReflinkRefused, InsufficientSpace or CopyFailed.
    """
    with _told():
        fcntl.ioctl(dst_fd, FICLONE, src_fd)


def clone_ranges(src_fd: int, dst_fd: int, ranges: Ranges) -> None:
    """Make `dst_fd` as long as the source, and share the source's extents, holes included, in
    these ranges, each of which begins and ends with a block of the file system. Not synced.

    Raises what `clone_into_fd` does.
    """
    size = os.fstat(src_fd).st_size
    with _told():
        os.ftruncate(dst_fd, size)
        for start, end in ranges.tolist():
            if start < size:
                length = 0 if end >= size else end - start  # 0 is up to the end
                fcntl.ioctl(dst_fd, FICLONERANGE, _RANGE.pack(src_fd, start, length, start))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """The file system's refusals as errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _CANNOT:
            raise ReflinkRefused(
                f"The file system cannot share these files' extents ({error.strerror})."
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientSpace("The file system is full; nothing was kept.") from error
        raise CopyFailed(f"Sharing extents failed: {error.strerror}.") from error


def can_reflink(src_dir: Path, dst_dir: Path) -> bool:
    """Whether files of `src_dir` can be reflinked into `dst_dir`.

    A yes is remembered per pair of file systems. A no is asked for again, which takes less than a
    millisecond: device numbers are used again, by another file system on the same device. Tried
    with a real file of one block: sharing a mount is neither needed (btrfs subvolumes) nor enough
    (XFS without reflink).
    """
    key = (_file_system(src_dir), _file_system(dst_dir))
    if key in _shares:
        return True
    if shares := _probe(src_dir, dst_dir):
        _shares.add(key)
    return shares


def _file_system(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, os.statvfs(path).f_fsid


def sync_source(path: Path) -> None:
    """Write out a file's dirty pages. FICLONE does it too, but then inside the pause."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _flags(descriptor: int) -> int:
    try:
        answer = fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, struct.pack("l", 0))
    except OSError:
        return 0  # tmpfs, NFS: no such attributes
    return int(struct.unpack("l", answer)[0]) & 0xFFFFFFFF


def _take_over_nocow(src_fd: int, dst_fd: int) -> None:
    source_flags, target_flags = _flags(src_fd), _flags(dst_fd)
    if (source_flags ^ target_flags) & FS_NOCOW_FL:
        with contextlib.suppress(OSError):  # then FICLONE says what is wrong
            wanted = target_flags ^ FS_NOCOW_FL
            fcntl.ioctl(dst_fd, FS_IOC_SETFLAGS, struct.pack("l", wanted))


def _probe(src_dir: Path, dst_dir: Path) -> bool:
    """Try with files that have no name: nothing of them is left when we are killed."""
    try:
        with (
            tempfile.TemporaryFile(dir=src_dir) as source,
            tempfile.TemporaryFile(dir=dst_dir) as target,
        ):
            source.write(b"\1" * 4096)
            source.flush()
            _take_over_nocow(source.fileno(), target.fileno())
            clone_into_fd(source.fileno(), target.fileno())
    except (ReflinkRefused, CopyFailed, OSError):
        return False
    return True
