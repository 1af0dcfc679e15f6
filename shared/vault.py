"""The vault: one folder per snapshot or image, readable without Triptych.

Owns: where copies live, how they come to be whole (`<id>.partial`, then a rename)
and how they go (`<id>.deleting`, then removal), and the manifest that makes a
folder explain itself. What is in the disks is the copy engine's.

    <root>/snapshots/<server>/<snapshot>/   manifest.json  domain.xml  RESTORE.md
    <root>/images/<server>/<image>/         vda.qcow2 …    nvram.fd  tpm.permall

Finished folders are 0700 with files 0400. The directories above, and a
`.partial` one, are 0711: QEMU, as its own user, must be able to walk in to write.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from shared import faults
from shared.disks import images
from shared.disks.digest import digest
from shared.disks.durable import sync
from shared.disks.space import full_is_said
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.errors import DefinitionInvalid
from shared.manifest import (
    DEFINITION,
    MANIFEST,
    NOTES,
    Kind,
    Manifest,
    ManifestUnreadable,
    VaultError,
    read_manifest,
    seal_files,
    sealed,
    write_manifest,
)

MANIFESTS_LOCK = ".manifests.lock"
PARTIAL = ".partial"
DELETING = ".deleting"

_FOLDERS: dict[Kind, str] = {"snapshot": "snapshots", "image": "images", "farm": "farms"}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_WALK = 0o711


class CopyExists(VaultError):
    """A copy of that id is in the vault already"""

    code = "copy_exists"
    status = 409


class VaultReadOnly(VaultError):
    """The vault's file system is read-only"""

    code = "vault_read_only"
    status = 503


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

        Files become 0400, everything is synced (but a farm's, which a power cut undoes with its
        operation), the manifest is written last, with the digests of all but the disks, which
        would take too long.
        Returns the final folder. Raises VaultError if a file it names is missing,
        InsufficientSpace.
        """
        names = [disk.file for disk in manifest.disks]
        names += [*manifest.beside.values(), *([manifest.memory] if manifest.memory else [])]
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
        if manifest.kind != "farm":
            sync(self.final.parent)
        self._published = True
        return self.final

    def _complete(self, manifest: Manifest, definition_xml: str) -> None:
        (self.path / DEFINITION).write_text(definition_xml)
        (self.path / NOTES).write_text(_notes(manifest, definition_xml))
        digests = {name: digest(self.path / name) for name in manifest.small_files}
        whole = manifest.model_copy(update={"digests": digests})
        (self.path / MANIFEST).write_bytes(sealed(whole))
        lasting = manifest.kind != "farm"
        seal_files(list(self.path.iterdir()), lasting=lasting)
        self.path.chmod(0o700)
        if lasting:
            sync(self.path)


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

    def here(self, folder: str) -> Path:
        """A copy's folder that was written down when the vault, perhaps, had another path."""
        return self.root.joinpath(*Path(folder).parts[-3:])

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

    def refuse_read_only(self, folder: Path) -> None:
        """Raise VaultReadOnly where this copy could not be removed, now."""
        if folder.exists() and not os.access(folder.parent, os.W_OK):
            raise VaultReadOnly(
                f"{folder} cannot be removed: the vault's file system is read-only. The copy is as "
                "it was, and can be restored and verified; see to the disk, make it writable "
                "(`mount -o remount,rw`), and ask again."
            )

    def remove(self, path: Path, *, others_at_work: bool = False) -> None:
        """Delete a copy's folder. It stops counting at once; calling again is fine. Only that of
        a farm's copy, which never counts, may be back after a power cut.

        The server's folder goes too when it is empty, unless there may be `others_at_work`: one
        that has just made it would find it gone.
        """
        if not path.resolve().is_relative_to(self.root.resolve()) or path == self.root:
            raise VaultError(f"{path} is not a copy in this vault; nothing was removed.")
        doomed = path if path.suffix == DELETING else path.with_name(path.name + DELETING)
        lasting = not path.is_relative_to(self.root / _FOLDERS["farm"])
        if path.exists() and path != doomed:
            if doomed.exists():
                shutil.rmtree(doomed)
            path.rename(doomed)
            if lasting:
                sync(path.parent)
            faults.point("remove:renamed")
        if doomed.exists():
            shutil.rmtree(doomed)
            if lasting:
                sync(doomed.parent)
        if not others_at_work:
            with contextlib.suppress(OSError):  # other copies of the server are there
                path.parent.rmdir()

    def record(self, folder: Path, found: Mapping[str, str]) -> Manifest:
        """Add digests to a whole copy's manifest where it has none; the manifest as it is then.

        Others may be at it: one writes at a time. Raises ManifestUnreadable, also if the copy was
        removed meanwhile, InsufficientSpace, OSError.
        """
        manifest = read_manifest(folder)
        if manifest.sealed and manifest.with_digests(found) == manifest:
            return manifest  # also where nothing can be written
        lock = os.open(self.root / MANIFESTS_LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            manifest = read_manifest(folder)
            complete = manifest.with_digests(found)
            if complete != manifest or not manifest.sealed:
                write_manifest(folder, complete)
            return complete
        finally:
            os.close(lock)

    def manifest(self, folder: Path) -> Manifest:
        """That of a copy that is about to be used: it is that copy's, and the small files beside
        the disks are what they were, as far as that is known.

        Raises ManifestUnreadable.
        """
        manifest = read_manifest(folder)
        if not self.is_in_place(folder, manifest):
            raise ManifestUnreadable(
                f"In {folder} are the files of {manifest.kind} {manifest.id}. Nothing was changed; "
                "put each folder back where it belongs: `triptych-admin doctor` names them."
            )
        for name in filter(manifest.digests.get, {manifest.definition, *manifest.beside.values()}):
            try:
                same = digest(folder / name) == manifest.digests[name]
            except OSError as error:
                raise ManifestUnreadable(f"{folder / name} cannot be read: {error}.") from error
            if not same:
                raise ManifestUnreadable(
                    f"{folder / name} is not what was stored. Nothing was changed; use another "
                    "copy, or put this one's files back as they were."
                )
        return manifest

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


def wrong_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is missing of a copy, or tells another size than it had; nothing is read through: of a
    qcow2 only its head. Raises OSError."""
    for name in filter(None, (manifest.definition, *manifest.beside.values(), manifest.memory)):
        if not (folder / name).is_file():
            yield f"{name} is missing"
    for disk in manifest.disks:
        path = folder / disk.file
        if not path.is_file():
            yield f"{disk.file} is missing"
        elif wrong := images.wrong_size(path, disk.format, disk.virtual_bytes):
            yield f"{disk.file} {wrong}"


def total_bytes(paths: Sequence[Path]) -> int:
    """What these files take up on disk, in bytes; shared extents count for each."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def _notes(manifest: Manifest, definition_xml: str) -> str:
    """How to bring this very copy back with plain tools, for a reader in need."""
    server = manifest.server
    wanted: dict[str, str] = {}
    with contextlib.suppress(DefinitionInvalid):
        disks = DomainDefinition.parse(definition_xml).disks
        wanted = {disk.target: disk.format for disk in disks}
    lines = [
        f"# {server.name}, as it was at {manifest.taken_at.isoformat(timespec='seconds')}",
        "",
        f"This folder holds a whole {manifest.kind} of the server {server.name} (domain UUID "
        f"{server.uuid}), {manifest.consistency} consistent. It needs nothing outside itself.",
        "",
        *_checks(manifest),
        "## Restore with plain virsh",
        "",
        "As root, in this folder. It replaces the server's disks: keep the old ones elsewhere.",
        "",
        f"    virsh destroy {server.name}    # if it runs",
    ]
    for disk in manifest.disks:
        path = f"THE-PATH-OF-{disk.target.upper()}"
        if (own := wanted.get(disk.target, disk.format)) != disk.format:
            lines.append(f"    qemu-img convert -f {disk.format} -O {own} {disk.file} {path}")
        else:
            lines.append(f"    cp --sparse=always --reflink=auto {disk.file} {path}")
        lines.append(f"    chmod 600 {path}")
    if manifest.nvram:
        lines.append(f"    cp {manifest.nvram} THE-PATH-OF-NVRAM")
        lines.append("    chmod 600 THE-PATH-OF-NVRAM")
    if manifest.tpm:
        lines.append(f"    install -D -m 600 {manifest.tpm} THE-PATH-OF-TPM")
    lines += [
        f"    virsh define {manifest.definition}",
        *([f"    virsh autostart {server.name}"] if manifest.autostart else []),
        f"    virsh start --force-boot {server.name}",
        "",
        f"The paths are those in {manifest.definition}: the `<source file=…>` of each disk"
        + (" and the text of `<nvram>`." if manifest.nvram else "."),
        *_tpm_path(manifest),
        "The copies' formats:",
        "",
    ]
    lines += [f"- {disk.target}: {disk.file}, {disk.format}" for disk in manifest.disks]
    if manifest.memory:
        lines += [
            "",
            f"{manifest.memory} holds the RAM of the same instant. To go on there instead of "
            "booting, with the disks in place and nothing started:",
            "",
            f"    virsh restore --running {manifest.memory}",
        ]
    if manifest.left_out:
        lines += ["", "## Not in this copy", ""]
        lines += [f"- {item.target}: {item.reason}" for item in manifest.left_out]
    return "\n".join(lines) + "\n"


def _tpm_path(manifest: Manifest) -> list[str]:
    if not manifest.tpm:
        return []
    return [
        f"THE-PATH-OF-TPM is /var/lib/libvirt/swtpm/{manifest.server.uuid}/tpm2/tpm2-00.permall, "
        "of a TPM 1.2 …/tpm1.2/tpm-00.permall, unless the `<backend>` of `<tpm>` has a `<source>`. "
        "It goes there before the first start; libvirt gives it to swtpm's user then.",
    ]


def _checks(manifest: Manifest) -> list[str]:
    disks = " ".join(disk.file for disk in manifest.disks)
    return [
        "## Check it",
        "",
        f"    b3sum {disks}",
        "",
        "says what `digest` of each disk in manifest.json says, once that is set (some time after "
        "the copy was made). `digests` there has the other files', and",
        "",
        "    head -n -2 manifest.json | b3sum",
        "",
        "says what `seal` says in its last line but one: that none of this was changed.",
        "",
    ]
