"""The UEFI variables: a small file, copied byte by byte into the vault and out again."""

import os
import shutil
import time
from pathlib import Path

from shared.disks.catching_up import TICK_NS
from shared.disks.reflink import sync_source
from shared.disks.space import full_is_said


class Nvram:
    """Those of a server, copied, not cloned, at the disks' instant."""

    def __init__(self, path: str | None, destination: Path) -> None:
        self.source = Path(path) if path else None
        self.copy = destination / "nvram.fd"
        self._seen: tuple[int, int] | None = None
        self._lately = False

    def warm(self) -> None:
        """Copy it ahead; it is rarely written, so that `take` mostly has nothing to do.

        Raises InsufficientSpace.
        """
        if self.source is not None and self.source.is_file():
            self._seen = self._stamp()
            self._lately = time.time_ns() - self.source.stat().st_mtime_ns < TICK_NS
            with full_is_said(self.copy.parent):
                shutil.copyfile(self.source, self.copy)
                self.copy.chmod(0o600)

    def take(self) -> None:
        """Copy it again if it was written since, or so lately before that one cannot tell."""
        if self._seen is not None and (self._lately or self._stamp() != self._seen):
            self.warm()

    def _stamp(self) -> tuple[int, int] | None:
        if self.source is None:
            return None
        status = self.source.stat()
        return status.st_mtime_ns, status.st_size


def copy_nvram(src: Path, dst: Path) -> None:
    """Copy the UEFI variables to a new file, mode 0600, synced.

    Raises FileExistsError and InsufficientSpace.
    """
    with full_is_said(dst.parent):
        descriptor = os.open(dst, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as target, src.open("rb") as source:
                shutil.copyfileobj(source, target)
            sync_source(dst)
        except BaseException:
            dst.unlink(missing_ok=True)
            raise
