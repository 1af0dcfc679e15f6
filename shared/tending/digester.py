"""The digests of a host's copies, some time after each was made.

A copy is offered as soon as it is whole; reading all of it once more would take as long as a
stream does. So the BLAKE3 of its disks is computed afterwards, one file at a time on the whole
host, and written into its manifest. From then on a flipped byte is found by the next verification.
What is left to do is told by the manifests: after a restart it goes on with those that lack some.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog

from shared.disks import images, leisure
from shared.disks.errors import ImageDamaged
from shared.errors import Cancelled, TriptychError
from shared.manifest import read_manifest
from shared.operations import presence
from shared.settings import settings
from shared.tending.tender import Tender
from shared.vault import Vault

log = structlog.get_logger()

AGAIN_S = 3600.0
"""Until a copy whose files or manifest could not be read or written is tried again."""
LOCK = ".digester.lock"


class Digester(Tender):
    """Completes the manifests of this host's snapshots or images."""

    def __init__(self, kind: Literal["snapshot", "image"]) -> None:
        super().__init__(f"{kind}-digester")
        self.kind = kind
        self._rest: dict[Path, float] = {}
        """When each copy is to be looked at again; never, if it is complete."""
        self._found: dict[tuple[Path, str], str] = {}
        """What was computed and could not be written: a full disk costs no second reading."""

    def turn(self) -> None:
        vault = Vault(settings().vault)
        folders = set(vault.copies(self.kind))
        self._rest = {path: until for path, until in self._rest.items() if path in folders}
        self._found = {key: value for key, value in self._found.items() if key[0] in folders}
        for folder in folders:
            if self.stopping():
                return
            if self._rest.get(folder, 0.0) > time.monotonic():
                continue
            try:
                self._complete(vault, folder)
                self._rest[folder] = float("inf")
            except Cancelled:
                return
            except (OSError, TriptychError) as error:
                if folder.is_dir():  # else it was deleted meanwhile
                    log.warning("digest.failed", copy=folder.name, reason=str(error))
                self._rest[folder] = time.monotonic() + AGAIN_S

    def _complete(self, vault: Vault, folder: Path) -> None:
        manifest = read_manifest(folder)
        for disk in manifest.disks:  # what is cut short is not to count as what was stored
            if wrong := images.wrong_size(folder / disk.file, disk.format, disk.virtual_bytes):
                raise ImageDamaged(f"{disk.file} {wrong}")
        for name in manifest.files:
            if manifest.digest_of(name) is None:
                manifest = vault.record(folder, {name: self._digest(vault, folder, name)})
                del self._found[folder, name]
        if not manifest.sealed:
            vault.record(folder, {})

    def _digest(self, vault: Vault, folder: Path, name: str) -> str:
        if (folder, name) not in self._found:
            with self._alone(vault):
                self._found[folder, name] = leisure.digest(
                    folder / name, presence.folder(), self.stopping
                )
        return self._found[folder, name]

    @contextlib.contextmanager
    def _alone(self, vault: Vault) -> Iterator[None]:
        """While no other worker of the host reads for a digest. Raises Cancelled."""
        lock = os.open(vault.root / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._stopped.wait(0.5):
                        raise Cancelled("The worker ends.") from None
            yield
        finally:
            os.close(lock)
