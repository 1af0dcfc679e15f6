"""The vault: one folder per snapshot or image, readable without Triptych.

Owns: where copies live, how they come to be whole (`<id>.partial`, then a rename)
and how they go (`<id>.deleting`, then removal), and the manifest that makes a
folder explain itself. What is in the disks is the copy engine's.

    <root>/snapshots/<server>/<snapshot>/   manifest.json  domain.xml  RESTORE.md
    <root>/images/<server>/<image>/         vda.qcow2 …    nvram.fd

Finished folders are 0700 with files 0400. The directories above, and a
`.partial` one, are 0711: QEMU, as its own user, must be able to walk in to write.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shared import faults
from shared.disks.space import full_is_said
from shared.errors import TriptychError

Kind = Literal["snapshot", "image", "farm"]

MANIFEST = "manifest.json"
DEFINITION = "domain.xml"
NOTES = "RESTORE.md"
NVRAM = "nvram.fd"
PARTIAL = ".partial"
DELETING = ".deleting"
VERSION = 1

_FOLDERS: dict[Kind, str] = {"snapshot": "snapshots", "image": "images", "farm": "farms"}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_WALK = 0o711


class VaultError(TriptychError):
    """The vault is not as it should be"""

    code = "vault_error"
    status = 500


class CopyExists(VaultError):
    """A copy of that id is in the vault already"""

    code = "copy_exists"
    status = 409


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
    """`file` is a name in the folder; `bytes` what it took up; `digest` is added later."""

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
    """What a copy is, in its own folder."""

    version: int = VERSION
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
    memory: str | None = None
    tools: dict[str, str] = {}


class Partial:
    """A copy in the making. Left without `publish`, its folder is removed."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + PARTIAL)
        self._published = False

    def __enter__(self) -> "Partial":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if not self._published:
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, manifest: Manifest, definition_xml: str) -> Path:
        """Make the copy whole and give it its name: from the rename on it counts.

        Files become 0400, everything is synced, the manifest is written last.
        Returns the final folder. Raises VaultError if a file it names is missing,
        InsufficientSpace.
        """
        names = [disk.file for disk in manifest.disks]
        names += [name for name in (manifest.nvram, manifest.memory) if name]
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise VaultError(f"The copy lacks {', '.join(missing)}, so it was not kept.")
        with full_is_said(self.path):
            self._complete(manifest, definition_xml)
        if self.final.exists():
            raise CopyExists(f"{self.final.name} is in the vault already; nothing was changed.")
        faults.point("publish:sealed")
        with full_is_said(self.path):
            self.path.rename(self.final)
        faults.point("publish:renamed")
        _sync(self.final.parent)
        self._published = True
        return self.final

    def _complete(self, manifest: Manifest, definition_xml: str) -> None:
        (self.path / DEFINITION).write_text(definition_xml)
        (self.path / NOTES).write_text(_notes(manifest))
        for entry in self.path.iterdir():
            _seal(entry)
        write_manifest(self.path, manifest)
        self.path.chmod(0o700)
        _sync(self.path)


class Vault:
    """The directory that holds a host's snapshots and images."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Make the root and its two folders, 0711, where they are missing."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, *(self.root / name for name in _FOLDERS.values())):
            folder.mkdir(exist_ok=True)
            folder.chmod(_WALK)

    def folder(self, kind: Kind, server_id: str, copy_id: str) -> Path:
        """Where a copy is, or would be. Raises VaultError for an id that is no plain name."""
        for part in (server_id, copy_id):
            if not _ID.fullmatch(part):
                raise VaultError(f"{part!r} cannot be the name of a folder in the vault.")
        return self.root / _FOLDERS[kind] / server_id / copy_id

    def begin(self, kind: Kind, server_id: str, copy_id: str) -> Partial:
        """A fresh folder to copy into; what an earlier attempt left there is removed.

        Raises CopyExists when the copy is whole already, InsufficientSpace.
        """
        with full_is_said(self.root.parent):
            return self._begun(kind, server_id, copy_id)

    def _begun(self, kind: Kind, server_id: str, copy_id: str) -> Partial:
        self.create()
        partial = Partial(self.folder(kind, server_id, copy_id))
        if partial.final.exists():
            raise CopyExists(f"{copy_id} is in the vault already; nothing was changed.")
        partial.final.parent.mkdir(exist_ok=True)
        partial.final.parent.chmod(_WALK)
        if partial.path.exists():
            shutil.rmtree(partial.path)
        partial.path.mkdir()
        partial.path.chmod(_WALK)
        return partial

    def remove(self, path: Path) -> None:
        """Delete a copy's folder. It stops counting at once; calling again is fine."""
        if not path.resolve().is_relative_to(self.root.resolve()) or path == self.root:
            raise VaultError(f"{path} is not a copy in this vault; nothing was removed.")
        doomed = path if path.suffix == DELETING else path.with_name(path.name + DELETING)
        if path.exists() and path != doomed:
            if doomed.exists():
                shutil.rmtree(doomed)
            path.rename(doomed)
            _sync(path.parent)
            faults.point("remove:renamed")
        if doomed.exists():
            shutil.rmtree(doomed)
            _sync(doomed.parent)
        with contextlib.suppress(OSError):  # other copies of the server are there
            path.parent.rmdir()

    def is_in_place(self, folder: Path, manifest: Manifest) -> bool:
        """Whether a folder is where the copy that its manifest describes belongs."""
        return folder == self.folder(manifest.kind, manifest.server.id, manifest.id)

    def copies(self, kind: Kind | None = None) -> Iterator[Path]:
        """The folders of all whole copies."""
        return (p for p in self._folders(kind) if p.suffix not in (PARTIAL, DELETING))

    def partials(self) -> list[Path]:
        """Folders of copies in the making, or that a dead worker left so."""
        return [path for path in self._folders(None) if path.suffix == PARTIAL]

    def leftovers(self) -> list[Path]:
        """Folders that were on their way out when the worker died; `remove` finishes them."""
        return [path for path in self._folders(None) if path.suffix == DELETING]

    def _folders(self, kind: Kind | None) -> Iterator[Path]:
        for name in [_FOLDERS[kind]] if kind else _FOLDERS.values():
            yield from sorted(p for p in self.root.glob(f"{name}/*/*") if p.is_dir())


def read_manifest(folder: Path) -> Manifest:
    """A copy's manifest. Raises ManifestUnreadable."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise ManifestUnreadable(
            f"The manifest of {folder.name} cannot be read, so the copy is not used. Its files "
            f"were left as they are: {error}"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write (or replace, whole) the manifest of a copy, mode 0400, synced.

    Raises InsufficientSpace, OSError; the manifest is what it was then.
    """
    fresh = folder / f".{MANIFEST}.new"
    try:
        with full_is_said(folder):
            fresh.unlink(missing_ok=True)
            fresh.write_text(manifest.model_dump_json(indent=2) + "\n")
            _seal(fresh)
            fresh.replace(folder / MANIFEST)
            _sync(folder)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def total_bytes(paths: Sequence[Path]) -> int:
    """What these files take up on disk, in bytes; shared extents count for each."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def _notes(manifest: Manifest) -> str:
    """How to bring this very copy back with plain tools, for a reader in need."""
    server = manifest.server
    lines = [
        f"# {server.name}, as it was at {manifest.taken_at.isoformat(timespec='seconds')}",
        "",
        f"This folder holds a whole {manifest.kind} of the server {server.name} (domain UUID "
        f"{server.uuid}), {manifest.consistency} consistent. It needs nothing outside itself.",
        "",
        "## Restore with plain virsh",
        "",
        "As root, in this folder. It replaces the server's disks: keep the old ones elsewhere.",
        "",
        f"    virsh destroy {server.name}    # if it runs",
    ]
    for disk in manifest.disks:
        path = f"THE-PATH-OF-{disk.target.upper()}"
        lines.append(f"    cp --sparse=always --reflink=auto {disk.file} {path}")
        lines.append(f"    chmod 600 {path}")
    if manifest.nvram:
        lines.append(f"    cp {manifest.nvram} THE-PATH-OF-NVRAM")
        lines.append("    chmod 600 THE-PATH-OF-NVRAM")
    lines += [
        f"    virsh define {manifest.definition}",
        f"    virsh start {server.name}",
        "",
        f"The paths are those in {manifest.definition}: the `<source file=…>` of each disk"
        + (" and the text of `<nvram>`." if manifest.nvram else "."),
        "Where a disk had another format than its copy, set `<driver type=…>` there too:",
        "",
    ]
    lines += [f"- {disk.target}: {disk.file}, {disk.format}" for disk in manifest.disks]
    if manifest.left_out:
        lines += ["", "## Not in this copy", ""]
        lines += [f"- {item.target}: {item.reason}" for item in manifest.left_out]
    return "\n".join(lines) + "\n"


def _seal(path: Path) -> None:
    os.chown(path, os.geteuid(), os.getegid())  # QEMU's user may own what QEMU wrote
    path.chmod(0o400)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
