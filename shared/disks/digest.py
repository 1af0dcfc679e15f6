"""BLAKE3 of a disk's content: holes count as the zeros they read as, so `b3sum` agrees."""

import os
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from shared.errors import Cancelled

_CHUNK = 4 * 2**20
_ZEROS = bytes(_CHUNK)


def digest(
    path: Path,
    progress: Callable[[int], None] = lambda _: None,
    cancelled: Callable[[], bool] = bool,
) -> str:
    """The hex digest; `progress` gets the bytes gone through. Holes are not read.

    Raises Cancelled within a chunk of 4 MiB, and OSError where the disk cannot be read.
    """
    hasher = blake3()
    done = 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while done < size:
            if cancelled():
                raise Cancelled("The check was cancelled; nothing was changed.")
            data_at = _next_data(file.fileno(), done, size)
            if data_at > done:
                chunk = _ZEROS[: min(_CHUNK, data_at - done)]
            else:
                chunk = os.pread(file.fileno(), _CHUNK, done)
                if not chunk:
                    raise OSError(f"{path.name} became shorter while it was read")
            hasher.update(chunk)
            # A disk is bigger than memory: what guests have there is worth more.
            os.posix_fadvise(file.fileno(), done, len(chunk), os.POSIX_FADV_DONTNEED)
            done += len(chunk)
            progress(done)
    return hasher.hexdigest()


def _next_data(descriptor: int, offset: int, size: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole is left
        return size
