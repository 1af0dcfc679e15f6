"""What linked clones stand on: one full copy of their source's disks, the base of their farm.

Where disks cannot share extents, a clone that is linked is an overlay on that copy instead of one
of its own. Owns: making the base and what is on it. It lies beside the clones' disks, belongs to
them and not to their source, and goes with the last of them (`shared.linked`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared import errors, faults
from shared.copying import write_out
from shared.disks.durable import sync
from shared.disks.overlays import OVERLAY_BYTES, base_path, create_overlay
from shared.disks.reflink import can_reflink
from shared.disks.space import ensure_space_for
from shared.hypervisor.definition import DomainDefinition
from shared.manifest import Manifest
from shared.operations.context import Context
from shared.settings import settings

WAY = "overlay"
"""The way of a clone that stands on a base."""
UNNEEDED = (
    "every disk shares its extents with its source's copy: independent clones take no more room "
    "than linked ones"
)
_MODE = 0o400  # libvirt gives it to QEMU's user when a clone is started; nobody is to write to it


@dataclass(frozen=True)
class Base:
    """The files of a base by the disks' targets, and their formats."""

    files: Mapping[str, Path]
    formats: Mapping[str, str]

    @property
    def paths(self) -> list[str]:
        return [str(path) for path in self.files.values()]

    def link(self, destinations: Mapping[str, Path]) -> None:
        """Make a clone's disks, as overlays. Raises what `create_overlay` does."""
        rooms = ((destinations[target].parent, OVERLAY_BYTES) for target in self.files)
        ensure_space_for(rooms, settings().free_floor)
        for target, path in self.files.items():
            create_overlay(path, self.formats[target], destinations[target])
            faults.point("base:linked")


def make(
    context: Context,
    source: Path,
    manifest: Manifest,
    folders: Mapping[str, Path],
    *,
    temporary: bool,
) -> Base | None:
    """The base of the operation's clones, made of the copy in `source`; None where each clone can
    share that copy's extents, and needs none.

    `folders` are where clones' disks go, by target. A `temporary` source, which nobody else uses
    and which goes with the operation, is not copied a second time where that can be avoided.
    """
    if all(can_reflink(source, folders[disk.target]) for disk in manifest.disks):
        return None
    _refuse_encrypted((source / manifest.definition).read_text())
    context.phase("copying the base")
    formats = {disk.target: disk.format for disk in manifest.disks}
    files = {
        target: base_path(folders[target], context.id, target, image_format)
        for target, image_format in formats.items()
    }
    context.undo_all(*(("remove_file", {"path": str(path)}) for path in files.values()))
    if not (temporary and _shared_names(source, manifest, files)):
        write_out(context, source, manifest, files)
    for path in files.values():
        path.chmod(_MODE)
        sync(path)  # a farm's copy, whose second name it may be, is not
        sync(path.parent)
    faults.point("base:made")
    return Base(files, formats)


def _refuse_encrypted(definition: str) -> None:
    """Raise Unsupported where a disk is encrypted: no overlay is made on one without its key."""
    original = DomainDefinition.parse(definition)
    encrypted = [disk.target for disk in original.disks if disk.encrypted]
    if encrypted:
        raise errors.Unsupported(
            f"{', '.join(encrypted)} of {original.name} is encrypted, and clones cannot be linked "
            "to it. No clone was made; ask for independent ones."
        )


def _shared_names(source: Path, manifest: Manifest, files: Mapping[str, Path]) -> bool:
    """Give the source's files their second names; False, and none of them, where that cannot be."""
    try:
        for disk in manifest.disks:
            os.link(source / disk.file, files[disk.target])
    except OSError:  # another file system, or one without such names
        for path in files.values():
            path.unlink(missing_ok=True)
        return False
    return True
