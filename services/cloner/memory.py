"""A clone that goes on with its source's memory from the very instant of its disks (C5).

The source's memory is saved once for all; each clone has a copy of the file that shares its
extents, with its own definition at the beginning. It is brought up paused, its links are taken
down, it runs, and gets other network cards. What is its source's until it boots is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared import faults
from shared.commands import CreateClones
from shared.copying import vault
from shared.disks.reflink import can_reflink, reflink
from shared.disks.space import full_is_said
from shared.errors import SnapshotWithoutMemory
from shared.hypervisor import domains, links, waking
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition, clone_definition
from shared.hypervisor.errors import MemoryNeedsReflink
from shared.hypervisor.hot import refuse_elsewhere, refuse_hot
from shared.hypervisor.memory import refuse_without_memory
from shared.hypervisor.savefile import SaveFile
from shared.hypervisor.waking import Card
from shared.manifest import read_manifest
from shared.models import Server
from shared.operations.context import Context
from shared.settings import settings

KEPT = (
    "smbios-uuid",
    "in the memory of the guest, which has read it; it is its own once it boots",
)
MEMORY = "memory"
"""Stands for the saved memory wherever files are named by their disk's target."""


def refuse(command: CreateClones, server: Server, source: Path | None) -> None:
    """Raise, before anything is done, where clones of the source cannot have its memory.

    The source is the running server, or the snapshot in the folder. Raises ServerNotRunning,
    SnapshotWithoutMemory, MemoryNotCloneable, MemoryNotUsable, MemoryNeedsReflink.
    """
    if source is None:
        domain = domains.find(connect(settings().libvirt_uri), server.domain_uuid)
        refuse_without_memory(domain)
        running = domain.live_definition()
    else:
        running = definition_in(source)
        refuse_elsewhere(settings().libvirt_uri, running)
    memory_bytes = command.memory_mib * 2**20 if command.memory_mib else None
    refuse_hot(running, vcpus=command.vcpus, memory_bytes=memory_bytes)
    elsewhere = settings().clone_dir
    if elsewhere and not can_reflink(vault().root, elsewhere):
        raise MemoryNeedsReflink(
            f"Clones with memory share their files with the vault, and {elsewhere}, where clones "
            "go (TRIPTYCH_CLONE_DIR), shares none. Nothing was copied; clone without memory."
        )


def saved_in(source: Path) -> Path:
    """The saved memory of a copy. Raises SnapshotWithoutMemory."""
    memory = read_manifest(source).memory
    if memory is None:
        raise SnapshotWithoutMemory(
            "The snapshot holds no memory. Nothing was copied; clone its disks alone, or take "
            "another one with memory."
        )
    return source / memory


def definition_in(source: Path) -> str:
    """That of the guest as it ran. Raises SnapshotWithoutMemory, MemoryNotUsable."""
    return SaveFile.read(saved_in(source)).xml


def wake(
    context: Context,
    domain: Domain,
    source: Path,
    definition: CloneDefinition,
    macs: Mapping[str, str],
    own: Path,
) -> list[Card]:
    """Have the clone, defined and with its disks, run on from the instant of the copy.

    `macs` are the addresses that it is to have, by its source's; `own` is where the file of its
    memory is meanwhile. Its links are down then, and what is returned are the network cards that
    its guest has of its source. Raises MemoryNotUsable.
    """
    saved = saved_in(source)
    stored, booting = SaveFile.read(saved), DomainDefinition.parse(definition.xml)
    running = clone_definition(
        stored.xml,
        name=definition.name,
        uuid=definition.uuid,
        disk_paths={disk.target: disk.path for disk in booting.disks if disk.path},
        disk_formats={disk.target: disk.format for disk in booting.disks},
        nvram_path=booting.nvram_path,
        mac_prefix=settings().mac_prefix,
        macs=macs,
    )
    reflink(saved, own)
    with full_is_said(own.parent):
        stored.with_definition(running.xml).write_to(own)
    faults.point("clone:memory-written")
    waking.restore_paused(domain, own, check=context.check)
    faults.point("clone:restored")
    own.unlink()
    cards = waking.unlink(domain, running)
    domain.resume()
    return cards


@dataclass(frozen=True)
class Network:
    """What came of connecting a clone: its new cards, by MAC, and what stayed its source's."""

    cards: list[str] = field(default_factory=list)
    stayed: set[str] = field(default_factory=set)
    """MACs that it has only once it boots."""
    kept: list[tuple[str, str]] = field(default_factory=list)

    def tell(self, told: dict[str, Any]) -> dict[str, Any]:
        """What is `told` of the clone's identity, with this."""
        has = [part for part in told["renewed"] if part.removeprefix("mac ") not in self.stayed]
        kept = [{"part": part, "reason": reason} for part, reason in self.kept]
        return {**told, "renewed": has, "kept": [*told["kept"], *kept]}


def connect_to_network(
    context: Context, domain: Domain, cards: list[Card], *, linked: bool
) -> Network:
    """Set the guest's clock and give it network cards of its own, which have a link if `linked`."""
    kept = [KEPT]
    if reason := waking.set_clock(domain):
        kept.append(("clock", f"as at the instant of its memory: {reason}"))
    faults.point("clone:clock-set")
    if not linked:
        links.link_down(domain)
        cards = [replace(card, xml=links.without_link(card.xml)) for card in cards]
    stayed = waking.exchange(domain, cards, check=context.check)
    faults.point("clone:connected")
    for card in cards:
        if reason := stayed.get(card.mac):
            advice = f"it has no link. Shut the clone down and start it, then it has {card.mac}"
            kept.append((f"mac {card.was}", f"{reason}; {advice}"))
    return Network([card.mac for card in cards if card.mac not in stayed], set(stayed), kept)
