"""What domains a host has, and word of every change.

Owns: reading; it changes nothing. One sick domain never hides the others.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from shared.disks.images import virtual_bytes
from shared.errors import TriptychError
from shared.hypervisor.connection import connect, translated
from shared.hypervisor.definition import DiskDefinition, DomainDefinition, macs_of, volume_of
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import (
    DefinitionInvalid,
    DomainMissing,
    LibvirtBusy,
    LibvirtFailed,
    LibvirtUnavailable,
)

log = logging.getLogger(__name__)

DEBOUNCE_S = 0.05
AT_LEAST_EVERY_S = 30.0
_RETRY_S = 2.0
_LOOK_S = 0.5


@dataclass(frozen=True)
class DiskFacts:
    """One disk; `capacity_bytes` is what the guest sees, None where it cannot be read."""

    target: str
    format: str
    path: str | None
    capacity_bytes: int | None
    writable: bool


@dataclass(frozen=True)
class DomainFacts:
    uuid: str
    name: str
    state: State
    vcpus: int
    memory_bytes: int
    disks: tuple[DiskFacts, ...]


def scan(connection: Any) -> list[DomainFacts]:
    """Every domain of the host, by name. Raises only if libvirt itself is away."""
    with translated("Listing the domains"):
        handles = connection.listAllDomains()
        uri = connection.getURI()
    facts = []
    for handle in handles:
        try:
            facts.append(facts_of(Domain(uri, handle)))
        except LibvirtUnavailable:
            raise
        except (TriptychError, libvirt.libvirtError) as error:
            # Undefined a moment ago, or with a definition we cannot read.
            log.warning("a domain was left out of the inventory: %s", error)
    return sorted(facts, key=lambda domain: domain.name)


def uuids(connection: Any) -> set[str]:
    """Of all domains, also of those that `scan` leaves out. Raises what libvirt raises."""
    return {each.uuid for each in all_domains(connection)}


def facts_of(domain: Domain) -> DomainFacts:
    """What a host reports about one domain: its disks as they are now. QEMU is not asked where a
    disk's file tells: one that is busy, as with a migration, does not answer for as long."""
    definition = DomainDefinition.parse(domain.live_definition())
    return DomainFacts(
        uuid=domain.uuid,
        name=domain.name,
        state=domain.state,
        vcpus=definition.vcpus,
        memory_bytes=definition.memory_bytes,
        disks=tuple(_disk_facts(domain, disk) for disk in definition.disks),
    )


def all_domains(connection: Any) -> list[Domain]:
    """Every domain of the host. Raises what libvirt raises."""
    with translated("Listing the domains"):
        uri = connection.getURI()
        return [Domain(uri, each) for each in connection.listAllDomains()]


def files_of(domain: Domain) -> dict[str, str]:
    """The files that a domain has for disks and UEFI variables, with their formats: those it has
    now, and those it will start with next. Raises DomainMissing, DefinitionInvalid.
    """
    found: dict[str, str] = {}
    for xml in {domain.definition(), domain.live_definition()}:
        definition = DomainDefinition.parse(xml)
        for disk in definition.disks:
            if path := disk.path or _volume_path(domain, xml, disk.target):
                found[path] = disk.format
        if definition.nvram_path:
            found[definition.nvram_path] = "raw"
        for beside in definition.beside:
            if beside.path:  # QEMU probes what is given no format
                found.setdefault(beside.path, beside.format or "qcow2")
    return found


def addresses(connection: Any) -> set[str]:
    """The MAC addresses of all domains of the host, in lower case: those that they have now, and
    those that they start with next. One that cannot be read is passed over."""
    found: set[str] = set()
    for domain in all_domains(connection):
        try:
            texts = [domain.definition(), *([domain.live_definition()] if domain.is_active else [])]
            found |= {mac.lower() for xml in texts for mac in macs_of(xml)}
        except (DomainMissing, DefinitionInvalid, LibvirtBusy, LibvirtFailed) as error:
            log.warning("a domain's addresses are not known: %s", error)
    return found


def _volume_path(domain: Domain, xml: str, target: str) -> str | None:
    """Where the volume is that a disk is given as; None for other disks, and where it is gone."""
    if (name := volume_of(xml, target)) is None:
        return None
    pool, volume = name

    def look_up(handle: libvirt.virDomain) -> str:
        found = handle.connect().storagePoolLookupByName(pool)
        return str(found.storageVolLookupByName(volume).path())

    try:
        return domain.call("Looking for a volume of", look_up)
    except LibvirtFailed:
        return None


def watch(
    uri: str,
    on_change: Callable[[], None],
    stop: threading.Event,
    *,
    on_lost: Callable[[str], None] = lambda _reason: None,
    at_least_every_s: float = AT_LEAST_EVERY_S,
) -> None:
    """Call `on_change` after every change of a domain, until `stop` is set. Blocks.

    A burst of changes makes one call, some 50 ms after its first; without any,
    it is called every `at_least_every_s` seconds, and once at the start and after
    each reconnection. `on_lost(reason)` is called when libvirt goes away, and as often
    for as long as it stays away.
    An error raised by a callback is logged and does not end the watch.
    """
    told: float | None = None
    while not stop.is_set():
        try:
            connection = connect(uri)
            told = None
            reason = _watch_connection(connection, on_change, stop, at_least_every_s)
        except (TriptychError, libvirt.libvirtError) as error:
            reason = str(error)
        if stop.is_set():
            return
        if told is None or time.monotonic() - told >= at_least_every_s:
            told = time.monotonic()
            _tell(on_lost, reason)
        stop.wait(_RETRY_S)


def _watch_connection(
    connection: Any, on_change: Callable[[], None], stop: threading.Event, every_s: float
) -> str:
    """Watch one connection until it dies; returns why it ended."""
    changed = threading.Event()
    changed.set()
    number = connection.domainEventRegisterAny(
        None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lambda *_: changed.set(), None
    )
    last = 0.0
    try:
        while not stop.is_set():
            if changed.wait(_LOOK_S) or time.monotonic() - last >= every_s:
                stop.wait(DEBOUNCE_S)
                changed.clear()
                last = time.monotonic()
                _tell(on_change)
            if not connection.isAlive():
                return "the connection to libvirt was lost"
        return "stopped"
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.domainEventDeregisterAny(number)


def _tell(callback: Callable[..., None], *arguments: str) -> None:
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback of the domain watch failed")


def _disk_facts(domain: Domain, disk: DiskDefinition) -> DiskFacts:
    capacity = _capacity(domain, disk)
    try:
        writable = disk.left_out_because is None
    except DefinitionInvalid:
        writable = False
    return DiskFacts(disk.target, disk.format, disk.path, capacity, writable)


def _capacity(domain: Domain, disk: DiskDefinition) -> int | None:
    if disk.path is None:
        return None
    path = Path(disk.path)
    with contextlib.suppress(OSError):
        if path.is_file() and (told := virtual_bytes(path, disk.format)) is not None:
            return told
    if domain.is_active or path.exists():
        with contextlib.suppress(TriptychError):
            # An inactive domain's disk is looked up by path, an active one's by either.
            return domain.call(
                "Measuring a disk of", lambda handle: int(handle.blockInfo(disk.target)[0])
            )
    return None
