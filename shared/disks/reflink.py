"""Copies that share extents: FICLONE and what it needs around it.

Owns: the ioctls. A reflinked file is a full file of its own; a block is copied
when either side writes it. Cost is per extent (about 19 µs), not per byte, so
`extent_count` tells beforehand how long a clone will hold a guest.
"""

import contextlib
import errno
import fcntl
import os
import struct
import tempfile
import threading
from pathlib import Path

from shared.disks.errors import CopyFailed, InsufficientSpace, ReflinkRefused

FICLONE = 0x40049409  # include/uapi/linux/fs.h
FS_IOC_FIEMAP = 0xC020660B
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_NOCOW_FL = 0x00800000
_FIEMAP_MAX_OFFSET = (1 << 64) - 1

# What file systems answer when they cannot share these two files' extents.
_CANNOT = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS}

_probed: dict[tuple[int, int], bool] = {}
_lock = threading.Lock()


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
    an empty file alone.
    """
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
    try:
        fcntl.ioctl(dst_fd, FICLONE, src_fd)
    except OSError as error:
        if error.errno in _CANNOT:
            raise ReflinkRefused(
                f"The file system cannot share these files' extents ({error.strerror})."
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientSpace("The file system is full; nothing was kept.") from error
        raise CopyFailed(f"Sharing extents failed: {error.strerror}.") from error


def can_reflink(src_dir: Path, dst_dir: Path) -> bool:
    """Whether files of `src_dir` can be reflinked into `dst_dir`; tried once per pair.

    Tried with a real file of one block: sharing a mount is neither needed
    (btrfs subvolumes) nor enough (XFS without reflink).
    """
    key = (src_dir.stat().st_dev, dst_dir.stat().st_dev)
    with _lock:
        if key not in _probed:
            _probed[key] = _probe(src_dir, dst_dir)
        return _probed[key]


def extent_count(path: Path) -> int:
    """How many extents `path` has; 0 where the file system does not tell.

    FIEMAP with room for none answers with the number alone
    (Documentation/filesystems/fiemap.rst). Not a sync: call `sync_source` first.
    """
    request = bytearray(struct.pack("=QQLLLL", 0, _FIEMAP_MAX_OFFSET, 0, 0, 0, 0))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FS_IOC_FIEMAP, request)
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return int(struct.unpack("=QQLLLL", request)[3])


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
