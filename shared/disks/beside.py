"""The small files beside the disks, UEFI variables and a virtual TPM's state: copied byte by byte
into the vault and out again."""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from shared.disks.catching_up import TICK_NS
from shared.disks.durable import sync
from shared.disks.reflink import sync_source
from shared.disks.space import full_is_said
from shared.hypervisor.definition import DomainDefinition, LeftOut

NVRAM_FILE, TPM_FILE = "nvram.fd", "tpm.permall"
"""Their names in the vault."""
SWTPM = Path("/var/lib/libvirt/swtpm")
"""Where libvirt keeps the state of emulated TPMs, as packages build it."""
_SWTPM_LOCK = ".lock"
"""Seen of swtpm 0.7: it stays beside the state when swtpm ends."""


class SmallFile:
    """One of a server, copied, not cloned, at the disks' instant."""

    def __init__(self, source: Path | None, copy: Path) -> None:
        self.source = source
        self.copy = copy
        self._seen: tuple[int, ...] | None = None
        self._lately = False

    @property
    def taken(self) -> Path | None:
        return self.copy if self.copy.exists() else None

    def warm(self) -> None:
        """Copy it ahead; it is rarely written, so that `take` mostly has nothing to do.

        Raises InsufficientSpace.
        """
        if self.source is not None and self.source.is_file():
            self._seen = self._stamp()
            self._lately = time.time_ns() - self.source.stat().st_mtime_ns < TICK_NS
            with full_is_said(self.copy.parent):
                self.copy.touch(0o600)  # what is in a TPM nobody else may read for an instant
                shutil.copyfile(self.source, self.copy)

    def take(self) -> None:
        """Copy it again if it was written since, or so lately before that one cannot tell."""
        if self._seen is not None and (self._lately or self._stamp() != self._seen):
            self.warm()

    def _stamp(self) -> tuple[int, ...] | None:
        if self.source is None:
            return None
        status = self.source.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino  # swtpm writes a new file


@dataclass(frozen=True)
class Beside:
    """Both of a server; either may be missing."""

    nvram: SmallFile
    tpm: SmallFile

    @property
    def copies(self) -> tuple[Path, Path]:
        return self.nvram.copy, self.tpm.copy

    def warm(self) -> None:
        """Raises InsufficientSpace."""
        self.nvram.warm()
        self.tpm.warm()

    def take(self) -> None:
        self.nvram.take()
        self.tpm.take()


def beside_of(
    live: DomainDefinition, destination: Path, swtpm: Path
) -> tuple[Beside, tuple[LeftOut, ...]]:
    """What is to be copied into `destination`, and what the copy goes without, and why."""
    nvram = Path(live.nvram_path) if live.nvram_path else None
    tpm = swtpm / live.tpm_state if live.tpm_state else None
    left_out: list[LeftOut] = []
    if nvram and (obstacle := _unreadable(nvram)):
        told = f"the UEFI variables cannot be read from {nvram}: {obstacle}"
        nvram, left_out = None, [LeftOut("nvram", told)]
    if tpm and (obstacle := _unreadable(tpm)):
        told = f"the state of the virtual TPM cannot be read from {tpm}: {obstacle}"
        tpm, left_out = None, [*left_out, LeftOut("tpm", told)]
    files = Beside(
        SmallFile(nvram, destination / NVRAM_FILE), SmallFile(tpm, destination / TPM_FILE)
    )
    return files, tuple(left_out)


def _unreadable(path: Path) -> str | None:
    try:
        with path.open("rb"):
            return None if path.is_file() else "it is no plain file"
    except OSError as error:
        return error.strerror or str(error)


def make_state_folder(folder: Path, swtpm: Path) -> None:
    """Make a TPM's directory in libvirt's for them, as libvirt does where it is the first to.

    libvirt gives it, with what is in it, to swtpm's user whenever it starts the domain.
    """
    for each, mode in ((folder.parent, 0o711), (folder, 0o700)):
        if each != swtpm and not each.is_dir():
            each.mkdir(mode)
            each.chmod(mode)
            sync(each.parent)


def remove_state_folder(folder: Path) -> None:
    """Remove such a directory, as far as it is empty but for the lock that swtpm leaves there."""
    with contextlib.suppress(OSError):
        if [each.name for each in folder.iterdir()] == [_SWTPM_LOCK]:
            (folder / _SWTPM_LOCK).unlink()
        folder.rmdir()
        folder.parent.rmdir()


def copy_small(src: Path, dst: Path) -> None:
    """Copy such a file to a new one, mode 0600, synced.

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
