"""What is known of a file system by its kind (statfs(2))."""

import ctypes
import struct
from pathlib import Path

# include/uapi/linux/magic.h
_XFS, _BTRFS, _EXT4 = 0x58465342, 0x9123683E, 0xEF53


def writes_elsewhere(path: Path) -> bool:
    """Whether the file system is known to write to no shared block, and FIEMAP to tell blocks
    of one disk: XFS and btrfs. SMB, say, reflinks too, and tells no places."""
    return _kind_of(path) in (_XFS, _BTRFS)


def keeps_locks(path: Path) -> bool:
    """Whether it is known to show QEMU's locks to all of the machine. NFS, say, may have none."""
    return _kind_of(path) in (_XFS, _BTRFS, _EXT4)


def _kind_of(path: Path) -> int:
    """0 where it cannot be told."""
    answer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statfs(bytes(path), answer):
        return 0
    return int(struct.unpack_from("l", answer)[0])
