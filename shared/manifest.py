"""What a copy is, in its own folder: the manifest, readable by people and by later versions.

Owns: its fields, and that each byte of it is what was written. Its last line but one seals
all that stands above it, so that `head -n -2 manifest.json | b3sum` gives the `seal`; what it says
of the other files' BLAKE3 is thereby sealed too.
"""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.disks.durable import sync
from shared.disks.space import full_is_said
from shared.errors import TriptychError

Kind = Literal["snapshot", "image", "farm"]

MANIFEST = "manifest.json"
DEFINITION = "domain.xml"
NOTES = "RESTORE.md"
VERSION = 1
NVRAM, TPM = "nvram", "tpm"
"""Stand for the UEFI variables and the TPM's state wherever files are named by their disk's
target."""
_SEAL = re.compile(rb'  "seal": "([0-9a-f]{64})"\n}\n\Z')


class VaultError(TriptychError):
    """The vault is not as it should be"""

    code = "vault_error"
    status = 500


class ManifestUnreadable(VaultError):
    """A copy's manifest is missing or damaged"""

    code = "image_damaged"
    status = 409


class _Model(BaseModel):
    # A newer Triptych may add fields; an older one must still read its copies.
    model_config = ConfigDict(extra="ignore", frozen=True)


class ManifestServer(_Model):
    id: str
    name: str
    uuid: str


class ManifestDisk(_Model):
    """`file` is a name in the folder; `bytes` what it took up; `digest`, its BLAKE3, is added
    later."""

    target: str
    file: str
    format: str
    virtual_bytes: int
    bytes: int
    digest: str | None = None


class ManifestLeftOut(_Model):
    target: str
    reason: str


class ManifestAbout(_Model):
    """What it was called when it was made; names may change later, in the database alone."""

    name: str | None = None
    description: str = ""
    origin: str = "manual"
    pinned: bool = False


class Manifest(_Model):
    """What a copy is, in its own folder. `digests` are those of the files that are no disks."""

    version: int = VERSION
    sealed: bool = False
    kind: Kind
    id: str
    server: ManifestServer
    about: ManifestAbout = ManifestAbout()
    taken_at: datetime
    way: str
    consistency: str
    consistency_reason: str = ""
    pause_ms: float = 0.0
    disks: list[ManifestDisk]
    left_out: list[ManifestLeftOut] = []
    definition: str = DEFINITION
    nvram: str | None = None
    tpm: str | None = None
    memory: str | None = None
    memory_bytes: int = 0
    autostart: bool = False
    tools: dict[str, str] = {}
    digests: dict[str, str] = {}

    @property
    def beside(self) -> dict[str, str]:
        """The files that are no disks and yet of the server, by NVRAM and TPM."""
        return {each: name for each, name in ((NVRAM, self.nvram), (TPM, self.tpm)) if name}

    @property
    def small_files(self) -> list[str]:
        """The files beside the disks and this manifest."""
        return [self.definition, NOTES, *self.beside.values()]

    @property
    def files(self) -> list[str]:
        memory = [self.memory] if self.memory else []
        return [*(disk.file for disk in self.disks), *memory, *self.small_files]

    def digest_of(self, file: str) -> str | None:
        """A file's BLAKE3 (hex), where it is known."""
        return {disk.file: disk.digest for disk in self.disks}.get(file, self.digests.get(file))

    def with_digests(self, found: Mapping[str, str]) -> "Manifest":
        """The same with these digests of files, by name, where it had none."""
        disks = [
            disk.model_copy(update={"digest": disk.digest or found.get(disk.file)})
            for disk in self.disks
        ]
        in_disks = {disk.file for disk in disks}
        others = {each: found[each] for each in self.files if each in found.keys() - in_disks}
        return self.model_copy(update={"disks": disks, "digests": {**others, **self.digests}})

    def without_digests(self) -> "Manifest":
        """The same for other files than those it was written for."""
        disks = [disk.model_copy(update={"digest": None}) for disk in self.disks]
        return self.model_copy(update={"disks": disks, "digests": {}})


def read_manifest(folder: Path) -> Manifest:
    """A copy's manifest. Raises ManifestUnreadable, also where a byte of it was changed."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        manifest = Manifest.model_validate_json(data)
    except (OSError, ValidationError) as error:
        raise ManifestUnreadable(
            f"The manifest of {folder.name} cannot be read, so the copy is not used. Its files "
            f"were left as they are: {error}"
        ) from error
    if not _intact(data, manifest):
        raise ManifestUnreadable(
            f"The manifest of {folder.name} is not what was written (its seal does not fit), so "
            f"the copy is not used. Its files were left as they are; {NOTES} beside it tells how "
            "to bring it back by hand."
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write (or replace, whole) the manifest of a copy, sealed, mode 0400, synced.

    Raises InsufficientSpace, OSError; the manifest is what it was then.
    """
    fresh = folder / f".{MANIFEST}.new"
    try:
        with full_is_said(folder):
            fresh.unlink(missing_ok=True)
            fresh.write_bytes(sealed(manifest))
            seal_files([fresh])
            fresh.replace(folder / MANIFEST)
            sync(folder)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sealed(manifest: Manifest) -> bytes:
    """The manifest as it stands in its file: with the digest of what is above that."""
    text = manifest.model_copy(update={"sealed": True}).model_dump_json(indent=2)
    above = f"{text.removesuffix(chr(10) + '}')},\n".encode()
    return above + f'  "seal": "{blake3(above).hexdigest()}"\n}}\n'.encode()


def _intact(data: bytes, manifest: Manifest) -> bool:
    """Whether the seal fits. One that was written without, by an earlier version, has none."""
    seal = _SEAL.search(data)
    if seal is None:
        return not manifest.sealed
    found: str = blake3(data[: seal.start()]).hexdigest()
    return found == seal[1].decode()


def seal_files(paths: Sequence[Path], *, lasting: bool = True) -> None:
    """Make finished files ours, mode 0400, and synced if they are to be `lasting`.

    All are changed, and begun to be written out, before the first is synced: that then waits for
    the others too. To be told that the cache is not needed, Linux begins with it (mm/fadvise.c).
    """
    for path in paths:
        os.chown(path, os.geteuid(), os.getegid())  # QEMU's user may own what QEMU wrote
        path.chmod(0o400)
        if lasting:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for path in paths if lasting else ():
        sync(path)
