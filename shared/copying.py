"""Between an operation and the copy engine: journal, progress and the vault around each copy.

Owns what all three services need alike: a server into the vault, a stored copy to another
one, a stored copy out to disk files.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from shared import mounted
from shared.database import by_database_clock
from shared.disks import engine
from shared.disks.beside import copy_small
from shared.disks.copied import CopiedDisk, taken_up
from shared.disks.engine import Capture
from shared.disks.materialise import materialise, needed_bytes
from shared.disks.space import ensure_space_for
from shared.hypervisor import domains
from shared.hypervisor.agent import Policy
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain
from shared.hypervisor.watchdog import Watchdog
from shared.manifest import (
    Kind,
    Manifest,
    ManifestAbout,
    ManifestDisk,
    ManifestLeftOut,
    ManifestServer,
)
from shared.models import Image, Server, Snapshot
from shared.operations.context import Context
from shared.operations.journal import Step as JournalStep
from shared.settings import settings
from shared.vault import Vault

HOLDS = ".holds"
"""In the vault: whose guest is held by a living worker (`shared.hypervisor.watchdog`)."""


@dataclass
class Stored:
    """A whole copy in the vault."""

    manifest: Manifest

    @property
    def taken_at(self) -> datetime:
        return self.manifest.taken_at

    @property
    def bytes(self) -> int:
        return sum(disk.bytes for disk in self.manifest.disks) + self.manifest.memory_bytes

    @property
    def left_out(self) -> list[dict[str, Any]]:
        return [each.model_dump() for each in self.manifest.left_out]

    def snapshot_row(self) -> Snapshot:
        """The row of a snapshot; it expires that long after it was taken (S2)."""
        return Snapshot(
            **self._columns(),
            taken_at=self.taken_at,
            with_memory=self.manifest.memory is not None,
            expires_at=self.taken_at + settings().snapshot_retention,
        )

    def image_row(self) -> Image:
        """The row of an image, by the name it was given, or one made of server and time."""
        about = self.manifest.about
        return Image(
            **self._columns(),
            name=about.name or self._default_name(),
            created_at=self.taken_at,
            pinned=about.pinned,
            origin=about.origin,
            left_out=self.left_out,
        )

    def _columns(self) -> dict[str, Any]:
        return {
            "id": self.manifest.id,
            "server_id": self.manifest.server.id,
            "description": self.manifest.about.description,
            "consistency": self.manifest.consistency,
            "way": self.manifest.way,
            "pause_ms": self.manifest.pause_ms,
            "bytes": self.bytes,
        }

    def _default_name(self) -> str:
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.manifest.server.name)
        start = plain[:36].strip("._-") or "image"
        return f"{start}-{self.taken_at:%Y%m%d-%H%M%S}-{self.manifest.id[-4:]}"

    def facts(self) -> dict[str, Any]:
        """What the operation's result tells about the copy."""
        return {
            "way": self.manifest.way,
            "consistency": self.manifest.consistency,
            "consistency_reason": self.manifest.consistency_reason,
            "pause_ms": self.manifest.pause_ms,
            "bytes": self.bytes,
            "left_out": self.left_out,
        }


def vault() -> Vault:
    """This host's vault. Raises VaultNotMounted."""
    mounted.ensure()
    return Vault(settings().vault)


def copy_server(
    context: Context,
    server: Server,
    kind: Kind,
    copy_id: str,
    *,
    quiesce: Policy,
    about: ManifestAbout | None = None,
    memory: bool = False,
) -> Stored:
    """Copy every writable disk of the server into the vault, at one instant.

    Raises what the engine raises; then nothing is left and the guest is as it was.
    """
    context.phase("checking")
    folder = vault().folder(kind, server.id, copy_id)
    domain = domains.find(connect(settings().libvirt_uri), server.domain_uuid)
    autostart = domain.autostart
    context.undo("remove_copy", folder=str(folder))
    with vault().begin(kind, server.id, copy_id) as partial:
        context.phase("copying")
        freezes = quiesce != "never" and not memory
        capture = engine.capture(
            domain,
            partial.path,
            watchdog=_watchdog(),
            quiesce=quiesce,
            progress=context.progress,
            cancelled=context.stopping,
            before=lambda step: _journal(context, domain, partial.path, step, freezes, memory),
            free_floor=settings().free_floor,
            pause_budget_ms=settings().pause_budget.total_seconds() * 1000,
            memory=memory,
            # A farm's is read once for each clone, and gone then.
            compress=settings().compression == "zstd" and kind != "farm",
            swtpm=settings().swtpm,
        )
        manifest = _manifest(kind, copy_id, server, domain, capture)
        more = {"about": about or ManifestAbout(), "autostart": autostart}
        manifest = manifest.model_copy(update=more)
        partial.publish(manifest, capture.definition)
    return Stored(manifest)


def _journal(
    context: Context,
    domain: Domain,
    folder: Path,
    step: engine.Step,
    freezes: bool,
    memory: bool,
) -> None:
    """What undoes a step upon the guest, should this worker and its watchdog both die."""
    if step in ("backup", "resumed"):  # no pause of ours; one that comes now is the owner's
        context.strike("resume_domain")
    if step == "thawed":  # a freeze that comes now is its owner's
        context.strike("thaw_domain")
        return
    if step == "resumed":
        return
    if step == "released":
        context.strike("resume_domain", "release_memory", "thaw_domain", "abort_backup")
        return
    uuid = {"uuid": domain.uuid}
    steps: list[JournalStep] = [("thaw_domain", uuid)] if freezes else []
    if step == "backup":
        ran = domain.state == "running"
        steps.append(("abort_backup", {**uuid, "folder": str(folder), "ran": ran}))
    if step == "pause":
        steps.append(("resume_domain", uuid))
    if memory:  # undone first: libvirt resumes nobody whose memory it saves
        steps.append(("release_memory", {**uuid, "folder": str(folder)}))
    context.undo_all(*steps, durable=False)


@cache
def _watchdog_of(pid: int) -> Watchdog:
    return Watchdog(settings().libvirt_uri, settings().vault / HOLDS)


def _watchdog() -> Watchdog:
    return _watchdog_of(os.getpid())


def _manifest(
    kind: Kind, copy_id: str, server: Server, domain: Domain, capture: Capture
) -> Manifest:
    return Manifest(
        kind=kind,
        id=copy_id,
        server=ManifestServer(id=server.id, name=server.name, uuid=domain.uuid),
        taken_at=by_database_clock(capture.taken_at),
        way=capture.way,
        consistency=capture.consistency,
        consistency_reason=capture.consistency_reason,
        pause_ms=capture.pause_ms,
        disks=[
            ManifestDisk(
                target=file.target,
                file=file.path.name,
                format=file.format,
                virtual_bytes=file.virtual_bytes,
                bytes=file.bytes,
            )
            for file in capture.files
        ],
        left_out=[
            ManifestLeftOut(target=each.target, reason=each.reason) for each in capture.left_out
        ],
        nvram=capture.nvram.name if capture.nvram else None,
        tpm=capture.tpm.name if capture.tpm else None,
        memory=capture.memory.name if capture.memory else None,
        memory_bytes=capture.memory.stat().st_blocks * 512 if capture.memory else 0,
        tools={"python": platform.python_version(), **_versions()},
    )


@cache
def _versions() -> dict[str, str]:
    connection = connect(settings().libvirt_uri)
    return {
        "libvirt": version(connection.getLibVersion()),
        "qemu": version(connection.getVersion()),
    }


def version(number: int) -> str:
    """libvirt's encoding: major * 1,000,000 + minor * 1,000 + release."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def copy_stored(
    context: Context,
    source: Path,
    server: Server,
    kind: Kind,
    copy_id: str,
    about: ManifestAbout,
) -> Stored:
    """Make another whole copy in the vault from the one in `source`."""
    context.phase("copying")
    folder = vault().folder(kind, server.id, copy_id)
    manifest = vault().manifest(source)
    context.undo("remove_copy", folder=str(folder))
    with vault().begin(kind, server.id, copy_id) as partial:
        files = {disk.target: partial.path / disk.file for disk in manifest.disks}
        files |= {each: partial.path / name for each, name in manifest.beside.items()}
        way = write_out(context, source, manifest, files)
        if way != "reflink":  # the same disk, in another file
            manifest = manifest.without_digests()
            disks = [
                disk.model_copy(update={"bytes": taken_up(files[disk.target])})
                for disk in manifest.disks
            ]
            manifest = manifest.model_copy(update={"disks": disks})
        changed = {"kind": kind, "id": copy_id, "way": way, "about": about}
        changed |= {"memory": None, "memory_bytes": 0}  # disks alone are in images
        copied = manifest.model_copy(update=changed)
        partial.publish(copied, (source / manifest.definition).read_text())
    return Stored(copied)


def write_out(
    context: Context,
    folder: Path,
    manifest: Manifest,
    destinations: Mapping[str, Path],
    formats: Mapping[str, str] | None = None,
) -> str:
    """Write the stored disks (and what is beside them) to new files; returns the way taken.

    `destinations` are by target; `formats` asks for another format than the stored one.
    """
    way = materialise(
        _stored_disks(folder, manifest),
        destinations,
        formats=formats,
        progress=context.progress,
        cancelled=context.stopping,
        free_floor=settings().free_floor,
    )
    for each in manifest.beside.keys() & destinations.keys():
        copy_small(folder / manifest.beside[each], destinations[each])
    return way


def ensure_room_for(count: int, folder: Path, manifest: Manifest, to: Mapping[str, Path]) -> None:
    """Raise InsufficientSpace unless the stored disks can be written out so many times to these
    directories, which are by target."""
    needs = needed_bytes(_stored_disks(folder, manifest), to)
    ensure_space_for(
        ((to[target], count * needed) for target, needed in needs.items()), settings().free_floor
    )


def _stored_disks(folder: Path, manifest: Manifest) -> list[CopiedDisk]:
    return [
        CopiedDisk(
            target=disk.target,
            path=folder / disk.file,
            format=disk.format,
            virtual_bytes=disk.virtual_bytes,
            bytes=disk.bytes,
        )
        for disk in manifest.disks
    ]
