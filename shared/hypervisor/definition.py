"""A domain's definition, read: its size, its disks, and which of them can be copied.

Owns: reading domain XML and pointing its disks elsewhere. Pure lxml, no libvirt.
Making a second domain out of a definition is `duplicate.py`'s.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, cast, get_args

from lxml import etree

from shared.errors import DomainWithoutDisks
from shared.hypervisor import commandline
from shared.hypervisor.errors import DefinitionInvalid, DiskNotCopyable

Kind = Literal["file", "block", "network", "volume", "other"]

# https://libvirt.org/formatdomain.html#memory-allocation
_UNITS = {
    "b": 1,
    "bytes": 1,
    "kb": 10**3,
    "k": 2**10,
    "kib": 2**10,
    "mb": 10**6,
    "m": 2**20,
    "mib": 2**20,
    "gb": 10**9,
    "g": 2**30,
    "gib": 2**30,
    "tb": 10**12,
    "t": 2**40,
    "tib": 2**40,
}
_SOURCE_ATTRIBUTE = {"file": "file", "block": "dev", "dir": "dir", "nvme": "namespace"}
# Where swtpm keeps a TPM's state below a directory of the domain's: libvirt's src/qemu/qemu_tpm.c.
_TPM_STATES = {"1.2": "tpm1.2/tpm-00.permall", "2.0": "tpm2/tpm2-00.permall"}
NVRAM_FOLDER = "/var/lib/libvirt/qemu/nvram"
"""Where libvirt keeps UEFI variables that no definition names, as packages build it."""
CHARACTER_DEVICES = ("serial", "console", "parallel", "channel")
# Children of <source> that belong to the place, not to the contents.
_PLACE = ("seclabel", "reservations", "cookies", "auth", "host", "dataStore")


@dataclass(frozen=True)
class LeftOut:
    """Something of a server that a copy does not hold, and why."""

    target: str
    reason: str


@dataclass(frozen=True)
class DiskDefinition:
    """One `<disk>`. `path` is a host path for kinds file and block, None otherwise.

    `format` is what libvirt reads it as: raw unless the definition says
    otherwise, never probed, since a guest can write any header into a raw disk.
    """

    target: str
    bus: str
    kind: Kind
    device: str
    format: str
    path: str | None
    readonly: bool
    shareable: bool
    has_backing: bool
    encrypted: bool = False
    transient: bool = False
    has_source: bool = True
    """False for a drive without a medium."""
    may_be_missing: bool = False
    """Whether a start goes without it where its file is gone (`startupPolicy`)."""

    @property
    def left_out_because(self) -> str | None:
        """Why a copy goes without this disk; None for a disk that must be copied."""
        if self.device == "cdrom":
            return "a CD-ROM is not copied"
        if self.device == "floppy":
            return "a floppy is not copied"
        if self.readonly:
            return "the disk is read-only for the guest"
        if self.shareable:
            return "the disk is shared with other guests"
        return None

    @property
    def not_copyable_because(self) -> str | None:
        """Why a writable disk cannot be copied; None if it can."""
        if self.device == "lun":
            return "it is a SCSI device passed through to the guest"
        if self.transient:
            return "its changes are thrown away when the guest goes off (transient)"
        if self.kind == "volume":
            return "it is given as a storage pool's volume; give its path instead"
        if self.kind not in ("file", "block"):
            return "it is reached over the network, not through a file or block device"
        if self.path is None:
            return "it has no source"
        return None


@dataclass(frozen=True)
class DomainDefinition:
    """What Triptych needs to know of a domain's XML."""

    xml: str
    name: str
    uuid: str
    vcpus: int
    memory_bytes: int
    disks: tuple[DiskDefinition, ...]
    nvram_path: str | None
    tpm_state: str | None
    """The file of an emulated TPM's state, below libvirt's directory for them unless absolute."""
    has_external_tpm: bool
    beside: tuple[commandline.Storage, ...] = ()
    """The disks that QEMU has past libvirt."""
    elsewhere: tuple[LeftOut, ...] = ()
    """What else keeps data of the guest's that no copy holds."""

    @classmethod
    def parse(cls, xml: str) -> "DomainDefinition":
        """Read a `<domain>`. Raises DefinitionInvalid."""
        root = parse_domain(xml)
        return cls(
            xml=xml,
            name=root.findtext("name", "").strip(),
            uuid=root.findtext("uuid", "").strip(),
            vcpus=vcpus_of(root),
            memory_bytes=memory_of(root),
            disks=tuple(_disk(node) for node in root.iterfind("devices/disk")),
            nvram_path=nvram_of(root),
            tpm_state=_tpm_state(root),
            has_external_tpm=root.find("devices/tpm/backend[@type='external']") is not None,
            beside=tuple(commandline.storage(root)),
            elsewhere=tuple(dict.fromkeys(_elsewhere(root))),
        )

    def split_disks(self) -> tuple[tuple[DiskDefinition, ...], tuple[LeftOut, ...]]:
        """The disks that a copy holds, and what it leaves out with the reason in words.

        Raises DiskNotCopyable for a writable disk that cannot be copied (a copy
        without it would look whole and not be), DomainWithoutDisks if none is left.
        """
        copied, left_out = [], []
        for disk in self.disks:
            if disk.left_out_because is not None:
                left_out.append(LeftOut(disk.target, disk.left_out_because))
            elif disk.not_copyable_because is not None:
                raise DiskNotCopyable(
                    f"Disk {disk.target} of {self.name} cannot be copied: "
                    f"{disk.not_copyable_because}. Nothing was copied.",
                    disk=disk.target,
                )
            else:
                copied.append(disk)
        if not copied:
            raise DomainWithoutDisks(
                f"{self.name} has no writable disk, so there is nothing to copy."
            )
        if self.has_external_tpm:
            left_out.append(LeftOut("tpm", "the state of the virtual TPM is not copied"))
        return tuple(copied), (*left_out, *self.left_beside)

    @property
    def left_beside(self) -> tuple[LeftOut, ...]:
        """What no copy holds since it is not in a `<disk>`."""
        reason = "it is on QEMU's command line; to have it copied make it a <disk>"
        return (*(LeftOut(each.told, reason) for each in self.beside), *self.elsewhere)

    def with_disk_paths(
        self, paths: Mapping[str, str], formats: Mapping[str, str] | None = None
    ) -> str:
        """The XML with the disks named in `paths` (by target) on those files, chains dropped."""
        root = parse_domain(self.xml)
        set_disk_paths(root, paths, formats or {})
        return to_text(root)


def parse_domain(xml: str) -> etree._Element:
    """Parse and check that it is a domain. Entities and the network are never used."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_blank_text=True)
    try:
        root = etree.fromstring(xml.encode(), parser)
    except etree.XMLSyntaxError as error:
        raise DefinitionInvalid(f"The definition is not well-formed XML: {error}.") from error
    if root.tag != "domain" or not root.findtext("name"):
        raise DefinitionInvalid("The definition is not that of a domain with a name.")
    return root


def renamed(xml: str, name: str) -> str:
    """The definition under that name; the same text when it has it already."""
    root = parse_domain(xml)
    node = root.find("name")
    if node is None or node.text == name:
        return xml
    node.text = name
    return to_text(root)


def log_files(xml: str) -> list[str]:
    """The files that the domain's character devices write to, or are logged to."""
    root = parse_domain(xml)
    found = [log.get("file", "") for log in root.iterfind("devices/*/log[@file]")]
    for tag in CHARACTER_DEVICES:
        ends = root.iterfind(f"devices/{tag}[@type='file']/source[@path]")
        found += [end.get("path", "") for end in ends]
    return list(dict.fromkeys(found))  # a console may be the serial line once more


def macs_of(xml: str) -> set[str]:
    """The addresses of the domain's network cards, also of those on QEMU's command line."""
    root = parse_domain(xml)
    own = {node.get("address", "") for node in root.iterfind("devices/interface/mac[@address]")}
    return own | set(commandline.macs(root))


def volume_of(xml: str, target: str) -> tuple[str, str] | None:
    """The storage pool and the volume that a disk is given as, if it is given so."""
    for source in parse_domain(xml).iterfind("devices/disk[@type='volume']/source"):
        disk = source.getparent()
        if disk is not None and _target(disk) == target:
            return source.get("pool", ""), source.get("volume", "")
    return None


def with_live_disks(inactive: DomainDefinition, live: DomainDefinition) -> str:
    """The inactive definition with the disks that the running domain has.

    A hot-plugged disk is not in the inactive definition, and one whose medium was changed
    stands there with the old file; a copy of the running server is of what it really has.
    """
    paths = {disk.target: disk.path for disk in inactive.disks}
    if all(disk.target in paths and paths[disk.target] == disk.path for disk in live.disks):
        return inactive.xml
    root, running = parse_domain(inactive.xml), parse_domain(live.xml)
    devices = root.find("devices")
    if devices is None:
        return inactive.xml
    known = {_target(node): node for node in devices.iterfind("disk")}
    for disk in running.iterfind("devices/disk"):
        old = known.get(_target(disk))
        if old is not None and _disk(old).path == _disk(disk).path:
            continue
        fresh = copy.deepcopy(disk)
        for name in ("alias", "backingStore", "mirror", "address", "privateData"):
            for node in fresh.findall(name):
                fresh.remove(node)
        if old is None:
            devices.append(fresh)
        else:
            devices.replace(old, fresh)
    return to_text(root)


def alone(xml: str, targets: Collection[str]) -> str:
    """The definition with these disks standing on no other file, as their copies do; the same text
    where that is so.

    libvirt writes down the chain that an external snapshot of its makes, and goes by that: QEMU is
    given a backing file then that the copy's header does not name (qemuSnapshotDiskUpdateSource).
    """
    if "<backingStore" not in xml and "<dataStore" not in xml:
        return xml
    root = parse_domain(xml)
    disks = [node for node in root.iterfind("devices/disk") if _target(node) in targets]
    chains = [node for disk in disks for node in disk.findall("backingStore") if len(node)]
    chains += [node for disk in disks for node in disk.findall("source/dataStore")]
    for node in chains:
        parent = node.getparent()
        assert parent is not None  # noqa: S101 - it is a disk's
        parent.remove(node)
    return to_text(root) if chains else xml


def to_text(root: etree._Element) -> str:
    return etree.tostring(root, encoding="unicode", pretty_print=True)


def set_disk_paths(
    root: etree._Element, paths: Mapping[str, str], formats: Mapping[str, str]
) -> None:
    """Point disks at plain files, in place. Raises DefinitionInvalid for an unknown target."""
    nodes = {_target(node): node for node in root.iterfind("devices/disk")}
    for target, path in paths.items():
        node = nodes.get(target)
        if node is None:
            raise DefinitionInvalid(f"The definition has no disk {target}.", disk=target)
        for tag in ("source", "backingStore", "mirror"):
            for old in node.findall(tag):
                node.remove(old)
                if tag == "source":
                    node.append(_file_source(old, path))
        if node.find("source") is None:
            node.append(etree.Element("source", file=path))
        node.set("type", "file")
        if target in formats:
            driver = node.find("driver")
            if driver is None:
                driver = etree.SubElement(node, "driver", name="qemu")
            driver.set("type", formats[target])


def memory_of(root: etree._Element) -> int:
    """The guest's memory in bytes."""
    return to_bytes(root.find("memory"))


def to_bytes(node: etree._Element | None) -> int:
    """The size in a `<memory unit='…'>`-like element, in bytes; KiB is libvirt's default."""
    if node is None or not (node.text or "").strip().isdigit():
        return 0
    unit = node.get("unit", "KiB").lower()
    if unit not in _UNITS:
        raise DefinitionInvalid(f"The definition has an unknown unit of memory: {unit}.")
    return int((node.text or "").strip()) * _UNITS[unit]


def vcpus_of(root: etree._Element) -> int:
    """How many vCPUs the guest starts with."""
    node = root.find("vcpu")
    if node is None:
        return 1
    return int(node.get("current") or (node.text or "1").strip())


def _file_source(old: etree._Element, path: str) -> etree._Element:
    """A `<source file=…>` that keeps what belongs to the contents (encryption, slices)."""
    new = etree.Element("source", file=path)
    for child in old:
        if child.tag not in _PLACE:
            new.append(copy.deepcopy(child))
    return new


def _target(node: etree._Element) -> str:
    target = node.find("target")
    return target.get("dev", "") if target is not None else ""


def _disk(node: etree._Element) -> DiskDefinition:
    target, driver, source = node.find("target"), node.find("driver"), node.find("source")
    raw_kind = node.get("type", "file")
    kind = cast(Kind, raw_kind if raw_kind in get_args(Kind) else "other")
    backing = node.find("backingStore")
    optional = source is not None and source.get("startupPolicy") == "optional"
    path = None
    if source is not None and kind in ("file", "block"):
        path = source.get(_SOURCE_ATTRIBUTE[kind])
    return DiskDefinition(
        target=_target(node),
        bus=target.get("bus", "") if target is not None else "",
        kind=kind,
        device=node.get("device", "disk"),
        format=driver.get("type", "raw") if driver is not None else "raw",
        path=path,
        readonly=node.find("readonly") is not None,
        shareable=node.find("shareable") is not None,
        has_backing=(backing is not None and len(backing) > 0)
        or node.find("source/dataStore") is not None,
        encrypted=node.find("encryption") is not None or node.find("source/encryption") is not None,
        transient=node.find("transient") is not None,
        may_be_missing=optional,
        has_source=path is not None or (kind not in ("file", "block") and source is not None),
    )


def label(node: etree._Element) -> str:
    """What a device is called where it is told of."""
    return " ".join(filter(None, [str(node.tag), node.get("type")]))


def directory(node: etree._Element) -> str:
    """A shared directory by the name that the guest mounts it by."""
    target = node.find("target")
    name = target.get("dir", "") if target is not None else ""
    return f"{label(node)} {name}".strip()


def writable_directories(root: etree._Element) -> list[etree._Element]:
    """Directories of the host that the guest writes to."""
    found = root.findall("devices/filesystem")
    return [each for each in found if each.get("type") != "ram" and each.find("readonly") is None]


def _elsewhere(root: etree._Element) -> Iterator[LeftOut]:
    for node in root.iterfind("devices/hostdev"):
        yield LeftOut(label(node), "what a device of the host stores is not copied")
    for node in writable_directories(root):
        yield LeftOut(directory(node), "a directory of the host is not copied")
    for node in root.iterfind("devices/memory"):
        if node.get("model") in ("nvdimm", "virtio-pmem"):
            yield LeftOut(f"memory {node.get('model')}", "what a memory device keeps is not copied")
    variables = "the UEFI variables are not copied: "
    for node in root.iterfind("os/nvram/source"):
        if node.get("file") is None:
            yield LeftOut("nvram", f"{variables}they are in no file of this host")
    for node in root.iterfind("os/loader[@type='pflash']"):
        if node.text and node.get("readonly") != "yes":  # libvirt's default is to write
            yield LeftOut("nvram", f"{variables}they are in the firmware itself")


def nvram_of(root: etree._Element) -> str | None:
    """The UEFI variables' file: text of `<nvram>`, or its `<source file>` (libvirt ≥ 8.5).

    Where libvirt is to choose a firmware, one before 9.2 does so at each start, and the definition
    of a domain that is off does not say; its file has the domain's name then.
    """
    node = root.find("os/nvram")
    if node is None:
        stateless = root.find("os/loader[@stateless='yes']") is not None
        if root.find("os[@firmware='efi']") is None or root.findtext("os/loader") or stateless:
            return None
        return f"{NVRAM_FOLDER}/{root.findtext('name', '').strip()}_VARS.fd"
    source = node.find("source")
    if source is not None:
        return source.get("file")
    return (node.text or "").strip() or None


def _tpm_state(root: etree._Element) -> str | None:
    """An emulated TPM's state: by the domain's UUID, or where `<source>` says (libvirt ≥ 10.10)."""
    backend = root.find("devices/tpm/backend[@type='emulator']")
    if backend is None:
        return None
    state = _TPM_STATES["1.2" if backend.get("version") == "1.2" else "2.0"]
    source = backend.find("source")
    if source is None:
        return f"{root.findtext('uuid', '').strip()}/{state}"
    path = source.get("path", "")
    return path if source.get("type") == "file" else str(PurePath(path) / PurePath(state).name)
