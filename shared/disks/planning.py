"""Deciding how a server would be copied, without touching anything.

Owns: the choice of the way for the server as a whole, what it leaves out and the
room it takes. Going the way is `engine.py`'s.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from shared.disks import images
from shared.disks.extents import extent_count
from shared.disks.reflink import SHARE_COST_MS, can_reflink, sync_source
from shared.file_systems import writes_elsewhere
from shared.hypervisor.definition import (
    DiskDefinition,
    DomainDefinition,
    LeftOut,
    alone,
    with_live_disks,
)
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import DiskNotCopyable, MemoryNeedsReflink
from shared.hypervisor.memory import refuse_without_memory

Way = Literal["reflink", "stream"]
Choice = Literal["auto", "reflink", "stream"]

CATCH_UP_FROM_MS = 5.0
"""Where sharing all at once would take longer, most of it is done before the pause."""
# A reflinked file takes next to nothing at first; its tree of extents is not nothing.
_REFLINK_BYTES = 1 << 20
_THICK = 0.9
_TARGET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class SourceDisk:
    """One disk to copy; `copy_format` is what its copy will be, `needed_bytes` what it takes at
    most where it shares nothing. Of an `encrypted` one QEMU reads nothing without its key."""

    disk: DiskDefinition
    path: Path
    virtual_bytes: int
    depends_on: str | None
    copy_format: str
    encrypted: bool
    needed_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """How a server would be copied to a place: the way, why, and the room it takes.

    `live` is its definition as it is now. `catching_up`: shared while the guest runs, so that
    the pause shares only what is left.
    """

    way: Way
    reason: str
    state: State
    live: DomainDefinition
    sources: tuple[SourceDisk, ...]
    left_out: tuple[LeftOut, ...]
    needed_bytes: int
    catching_up: bool = False


def plan(
    domain: Domain,
    destination: Path,
    *,
    way: Choice = "auto",
    reason: str = "stream was asked for",
    compress: bool = False,
) -> Plan:
    """Decide how to copy `domain` into `destination`, without touching anything.

    `reason` is why another way than the best is asked for. `compress` what is streamed, which
    only a qcow2 can hold: an active domain's disks in a second pass, beside the first. Raises
    DiskNotCopyable, DomainWithoutDisks, or CopyFailed where an image cannot be read.
    """
    live = DomainDefinition.parse(domain.live_definition())
    disks, left_out = live.split_disks()
    sources = tuple(_source(disk) for disk in disks)
    state = domain.state
    obstacle = _obstacle_to_reflink(sources, destination)
    if way == "reflink" and obstacle:
        raise DiskNotCopyable(f"{domain.name} cannot be reflinked: {obstacle}.")
    if way == "reflink" or (way == "auto" and not obstacle):
        needed = _REFLINK_BYTES * len(sources)
        pieces = sum(map(_pieces, sources)) if state == "running" else 0
        # Extents are shared whatever is in them, so the copy is what its source is.
        sources = tuple(replace(s, copy_format=s.disk.format) for s in sources)
        return Plan(
            "reflink",
            "every disk shares its extents",
            state,
            live,
            sources,
            left_out,
            needed,
            catching_up=pieces * SHARE_COST_MS > CATCH_UP_FROM_MS and writes_elsewhere(destination),
        )
    for source in sources:
        if source.encrypted:
            raise DiskNotCopyable(
                f"Disk {source.disk.target} of {domain.name} is encrypted and can be copied by "
                f"reflink alone; that is not possible here: {obstacle or reason}.",
                disk=source.disk.target,
            )
    sources = tuple(_streamed(source, state != "stopped", compress) for source in sources)
    left_out += tuple(
        LeftOut(s.disk.target, images.INSIDE_NOT_COPIED)
        for s in sources
        if images.has_snapshots_inside(s.path, s.disk.format)
    )
    needed = sum(s.needed_bytes for s in sources)
    needed *= 2 if compress and state != "stopped" else 1
    return Plan("stream", obstacle or reason, state, live, sources, left_out, needed)


def refuse_memory(domain: Domain, chosen: Plan) -> None:
    """Raise where a copy of the domain as planned cannot have its memory with it.

    ServerNotRunning; DiskNotCopyable where a disk that others write to would be of another
    instant; MemoryNeedsReflink, since QEMU holds the images of a guest inactive from the save
    until it is resumed, and begins no copy of its own then.
    """
    refuse_without_memory(domain)
    left_out = {each.target for each in chosen.left_out}
    disks = (disk for disk in chosen.live.disks if disk.target in left_out)
    shared = sorted(disk.target for disk in disks if disk.shareable)
    beside = [each.told for each in chosen.live.beside if each.writable]
    if beside:
        raise DiskNotCopyable(
            f"{domain.name} has a disk on QEMU's command line, {', '.join(beside)}, which is not "
            "copied: it would be of another instant than the memory. Nothing was touched; make it "
            "a <disk> of the domain, or do without memory."
        )
    if shared:
        raise DiskNotCopyable(
            f"{', '.join(shared)} of {domain.name} is shared with other guests and not copied: it "
            "would be of another instant than the memory. Nothing was touched; do without memory."
        )
    if chosen.way != "reflink":
        raise MemoryNeedsReflink(
            f"A copy of {domain.name} with its memory needs disks that can be shared with the "
            f"vault, and {chosen.reason}. Nothing was touched; do without memory, or put disks "
            "and vault on one XFS or btrfs."
        )


def definition_of(domain: Domain, chosen: Plan) -> tuple[str, tuple[LeftOut, ...]]:
    """The definition that goes with the copy, and what it names that is not in the copy."""
    copied = {source.disk.target for source in chosen.sources}
    xml = domain.definition()
    if chosen.state == "stopped":
        return alone(xml, copied), chosen.left_out
    inactive = DomainDefinition.parse(xml)
    plugged = {disk.target for disk in chosen.live.disks}
    later = tuple(
        LeftOut(disk.target, "it is in the definition, but not attached until the next start")
        for disk in inactive.disks
        if disk.target not in plugged
    )
    later += tuple(each for each in inactive.left_beside if each not in chosen.left_out)
    return alone(with_live_disks(inactive, chosen.live), copied), (*chosen.left_out, *later)


def _source(disk: DiskDefinition) -> SourceDisk:
    if disk.path is None or not _TARGET_NAME.fullmatch(disk.target):
        raise DiskNotCopyable(f"Disk {disk.target} has no usable name or source.")
    path = Path(disk.path)
    if not path.exists():
        raise DiskNotCopyable(
            f"Disk {disk.target} is {path}, which does not exist. Nothing was copied.",
            disk=disk.target,
        )
    about = images.info(path, disk.format)
    encrypted = disk.encrypted or about.encrypted
    depends_on = about.depends_on or ("its backing file" if disk.has_backing else None)
    copy_format = disk.format if disk.format in ("raw", "qcow2") else "qcow2"
    return SourceDisk(disk, path, about.virtual_bytes, depends_on, copy_format, encrypted)


def _pieces(source: SourceDisk) -> int:
    with contextlib.suppress(OSError):  # of which who copies it is told
        sync_source(source.path)  # what is yet to be written out may fall into many
    return extent_count(source.path)


def _streamed(source: SourceDisk, by_qemu: bool, compress: bool) -> SourceDisk:
    """With the format of its copy, and the bytes that takes at most.

    What QEMU copies of a running server is written to a raw copy with each hole as zeros.
    """
    path, own = source.path, source.disk.format
    all_of_it = by_qemu and source.copy_format == "raw"
    thin = all_of_it and images.measure(path, own, "qcow2") < source.virtual_bytes * _THICK
    if compress or thin:
        source, all_of_it = replace(source, copy_format="qcow2"), False
    needed = images.measure(path, own, source.copy_format)
    return replace(source, needed_bytes=source.virtual_bytes if all_of_it else needed)


def _obstacle_to_reflink(sources: Sequence[SourceDisk], destination: Path) -> str | None:
    """Why the server as a whole cannot be reflinked; None if it can."""
    for source in sources:
        target = source.disk.target
        if source.disk.kind != "file" or not source.path.is_file():
            return f"{target} is a block device"
        if source.depends_on is not None:
            return f"{target} stands on another file ({source.depends_on})"
        if not can_reflink(source.path.resolve().parent, destination):
            return f"{target} and the vault share no file system that shares extents"
    return None
