"""Verifying an image (I8, without the boot proof): is it, byte for byte, what it was?"""

import errno
from pathlib import Path
from typing import Any

from sqlmodel import Session

from shared import events, lookups, mounted
from shared.commands import VerifyImage
from shared.copying import vault
from shared.database import now, reading
from shared.disks import images as disk_images
from shared.disks.digest import digest
from shared.disks.errors import ImageDamaged
from shared.manifest import MANIFEST, Manifest, ManifestDisk, VaultError, read_manifest
from shared.models import Image
from shared.operations.context import Context, Outcome
from shared.operations.runner import handles
from shared.rotation import PASSED


@handles(VerifyImage)
def verify(context: Context, command: VerifyImage) -> Outcome:
    """Check each disk's structure, and each file's digest against the manifest.

    The digests of the disks are mostly there already, from the background (shared.tending);
    else this writes those that later verifications are held against. What is wrong is named in
    the result; an image that is damaged, or missing as a whole, is not restored from until a
    later verification finds it whole.
    """
    context.phase("verifying")
    with reading() as session:
        image = lookups.image(session, command.image)
    folder = vault().folder("image", image.server_id, image.id)
    faults = _faults(context, folder)
    state = "complete" if not faults else "damaged" if folder.is_dir() else "missing"
    _refuse_unseen(faults)
    result = state if faults else PASSED

    def apply(session: Session) -> None:
        row = session.get_one(Image, image.id)
        row.verified_at, row.verified_result = now(), result
        row.state = state
        session.add(row)
        tell(session, row)

    return Outcome({"image": image.id, "verified": result, "faults": faults}, apply)


def require_whole(context: Context, image: Image) -> None:
    """Verify a copy that is whole on disk and has no row yet, and note that in its row-to-be.

    Raises ImageDamaged, upon which the operation removes the copy, and Cancelled.
    """
    copied = context.latest()
    context.phase("verifying")
    if faults := _faults(context, vault().folder("image", image.server_id, image.id)):
        _refuse_unseen(faults)
        found = "; ".join(f"{each['file']}: {each['fault']}" for each in faults)
        raise ImageDamaged(
            f"The new image did not pass its verification and was not kept ({found}). No older "
            "image was touched; look at the vault's disk, then create an image by hand or wait "
            "for the next run."
        )
    image.verified_at, image.verified_result = now(), PASSED
    # What the operation says it went through is the copy.
    context.progress(copied.get("bytes_done", 0), copied.get("bytes_total", 0))


def tell(session: Session, image: Image) -> None:
    result = image.verified_result
    events.emit(session, "image.verified", image.server_id, image=image.id, result=result)


def _refuse_unseen(faults: list[dict[str, Any]]) -> None:
    """What went with its mount is neither missing nor damaged. Raises VaultNotMounted."""
    if faults:
        mounted.ensure()


def _faults(context: Context, folder: Path) -> list[dict[str, Any]]:
    try:
        manifest = read_manifest(folder)
    except VaultError as error:
        return [{"file": MANIFEST, "fault": error.detail}]
    if not vault().is_in_place(folder, manifest):
        return [{"file": MANIFEST, "fault": f"it is that of {manifest.kind} {manifest.id}"}]
    total = sum(disk.virtual_bytes for disk in manifest.disks)
    faults, found, before = [], {}, 0
    for disk in manifest.disks:
        try:
            found[disk.file] = _digest(context, folder, disk, before, total)
        except (ImageDamaged, OSError) as error:
            faults.append({"file": disk.file, "fault": str(error)})
        before += disk.virtual_bytes
    for name in manifest.small_files:
        try:
            found[name] = digest(folder / name)
        except OSError as error:
            faults.append({"file": name, "fault": str(error)})
    if not faults:  # what was not known yet is, from now on
        manifest = _recorded(folder, found, manifest)
    for name, seen in found.items():
        if (recorded := manifest.digest_of(name)) not in (None, seen):
            fault = f"its BLAKE3 is {seen}, the manifest says {recorded}"
            faults.append({"file": name, "fault": fault})
    return faults


def _recorded(folder: Path, found: dict[str, str], manifest: Manifest) -> Manifest:
    """The manifest with the digests, as it is kept; on a read-only disk, of which one wants to know
    what is whole on it, as it is."""
    try:
        return vault().record(folder, found)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return manifest


def _digest(context: Context, folder: Path, disk: ManifestDisk, before: int, total: int) -> str:
    path = folder / disk.file
    if wrong := disk_images.wrong_size(path, disk.format, disk.virtual_bytes):
        raise ImageDamaged(f"it {wrong}")
    disk_images.check_by_qemu(path, disk.format, context.check)
    return digest(path, lambda at: context.progress(before + at, total), context.stopping)
