"""Who has a disk file open: QEMU marks the images it uses with locks that anyone can ask for."""

import fcntl
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from shared.hypervisor.errors import DiskInUse

_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux


def is_open(path: Path) -> bool:
    """Whether QEMU holds its image locks on a file: bytes 100 to 299 of it.

    QEMU, block/file-posix.c: RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE.
    """
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    finally:
        os.close(descriptor)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def refuse_if_open(paths: Iterable[Path], doing: str, patience_s: float = 3.0) -> None:
    """Raise DiskInUse when a QEMU goes on holding one of `paths` (those that exist).

    For a server that is off: then it is another domain, or a tool, that uses its disk.
    """
    deadline = time.monotonic() + patience_s
    for path in paths:
        while path.is_file() and is_open(path):
            if time.monotonic() > deadline:
                raise DiskInUse(
                    f"{path} is in use by another domain or program although the server is off, "
                    f"so it was not {doing} and every disk is as it was. Find out who uses it "
                    f"(`lslocks`, `virsh list`), end that, and ask again."
                )
            time.sleep(0.05)
