"""The definition of a clone: a second domain that can run beside its source.

Owns: everything in a domain's XML that is the domain's own and must differ.
virtinst's `cloner.py` is the reference for what must change; to it are added
what fixed ports, sockets, devices and labels would collide on. Pure lxml.
"""

import secrets
import uuid as uuids
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from lxml import etree

from shared.hypervisor import commandline
from shared.hypervisor.definition import (
    CHARACTER_DEVICES,
    LeftOut,
    directory,
    label,
    nvram_of,
    parse_domain,
    set_disk_paths,
    to_text,
    writable_directories,
)
from shared.hypervisor.errors import DefinitionInvalid
from shared.hypervisor.sizing import set_memory, set_vcpus

_PRIORITY = "of two at one priority on the same CPUs of the host one may starve the other"
# A host device, memory that others map and a place in the host's network belong to one running
# guest; a lease and a pstore name one owner; labels are assigned anew by libvirt.
_DROPPED = (
    ("devices/hostdev", "a host device belongs to one guest"),
    ("devices/interface[@type='hostdev']", "a host device belongs to one guest"),
    ("devices/tpm/backend[@type='passthrough']/..", "the host's TPM belongs to one guest"),
    ("devices/tpm/backend[@type='external']/..", "the TPM behind its socket belongs to one guest"),
    ("devices/shmem", "it shares memory with other guests"),
    ("devices/input[@type='evdev']", "a host input device belongs to one guest"),
    ("devices/input[@type='passthrough']", "a host input device belongs to one guest"),
    ("devices/interface[@type='vhostuser']", "its switch port belongs to one guest"),
    ("devices/interface[@type='vdpa']", "a host device belongs to one guest"),
    (
        "devices/interface[@type='direct']/source[@mode='passthrough']/..",
        "a host device belongs to one guest",
    ),
    (
        "devices/interface[@type='ethernet']/target[@managed='no']/..",
        "its tap device on the host belongs to one guest",
    ),
    ("devices/interface[@type='server']", "its socket on the host belongs to one guest"),
    ("devices/interface[@type='client']", "its socket on the host belongs to one guest"),
    ("devices/interface[@type='udp']", "its socket on the host belongs to one guest"),
    ("devices/redirdev[@type='tcp']", "its socket on the host belongs to one guest"),
    ("devices/redirdev[@type='unix']", "its socket on the host belongs to one guest"),
    ("devices/smartcard[@type='tcp']", "its socket on the host belongs to one guest"),
    ("devices/smartcard[@type='unix']", "its socket on the host belongs to one guest"),
    ("devices/smartcard[@mode='host']", "a host device belongs to one guest"),
    (
        "devices/rng/backend[@model='egd']/source[@mode='bind']/../..",
        "its socket on the host belongs to one guest",
    ),
    ("devices/interface/portForward", "the host's ports are forwarded to one guest"),
    ("cputune/vcpusched", _PRIORITY),
    ("cputune/iothreadsched", _PRIORITY),
    ("cputune/emulatorsched", _PRIORITY),
)
_DROPPED_SILENTLY = (
    "title",  # virt-manager shows it in the name's place
    "seclabel",
    "devices//seclabel",
    "devices/lease",
    "devices/pstore",
    "devices/disk/backingStore",
    "devices/disk/mirror",
)
PSEUDO_TERMINAL = "its far end belongs to one guest; it is a pseudo-terminal now"
"""The one reason after which the guest still has the device."""
OWN_TPM = "two machines cannot have one TPM's keys and counters; the clone's own is empty at first"
_OWN_ADDRESSES = ("MAC", "IP", "IPV6")


@dataclass(frozen=True)
class CloneDefinition:
    """A clone's XML; its MACs by the source's; what of the source it goes without, and what is as
    the source's: (part, which)."""

    xml: str
    name: str
    uuid: str
    macs: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    kept: tuple[tuple[str, str], ...] = ()


def clone_definition(
    source_xml: str,
    *,
    name: str,
    uuid: str,
    disk_paths: Mapping[str, str],
    disk_formats: Mapping[str, str] | None = None,
    vcpus: int | None = None,
    memory_bytes: int | None = None,
    nvram_path: str | None = None,
    mac_prefix: str = "52:54:00",
    macs: Mapping[str, str] | None = None,
    keep_left_out: Collection[str] = (),
) -> CloneDefinition:
    """The definition of a clone of `source_xml` (an inactive definition).

    `disk_paths` names the clone's file for each copied disk, by target. Of the
    other disks CD-ROM and floppy drives stay, empty; read-only and shared ones
    go, except the targets in `keep_left_out`. Without `nvram_path` libvirt makes
    fresh UEFI variables under a path of its own. `macs` are those it is to have, by
    the source's; others are made up. Raises DefinitionInvalid; Unsupported for what QEMU is given
    past libvirt and two machines cannot share.
    """
    root = parse_domain(source_xml)
    old_name = root.findtext("name", "")
    _unset(root, "id")
    refuse_uncloneable(root)
    left_out = _drop(root)
    left_out += _keep_or_drop_disks(root, disk_paths, keep_left_out)
    set_disk_paths(root, disk_paths, disk_formats or {})
    _identify(root, name, uuid)
    left_out += _own_tpm(root)
    _set_nvram(root, nvram_path)
    its_macs = _renew_interfaces(root, mac_prefix, macs or {})
    known = dict(macs or {})
    own = commandline.make_own(root, lambda old: known.get(old) or random_mac(mac_prefix))
    left_out += [LeftOut(*each) for each in own.left_out]
    left_out += _own_character_devices(root, old_name, name)
    _own_ports(root)
    if memory_bytes is not None:
        set_memory(root, memory_bytes)
    if vcpus is not None:
        set_vcpus(root, vcpus)
    kept = {"qemu:commandline": ", ".join(own.kept), "cpu-pins": _pins(root)}
    return CloneDefinition(
        to_text(root),
        name,
        uuid,
        its_macs | own.macs,
        tuple(left_out),
        tuple((part, which) for part, which in kept.items() if which),
    )


def random_mac(prefix: str) -> str:
    """A MAC address that begins with `prefix` (1 to 5 octets). Raises DefinitionInvalid."""
    octets = prefix.lower().split(":")
    try:
        valid = 1 <= len(octets) <= 5 and all(0 <= int(o, 16) <= 255 for o in octets)
    except ValueError:
        valid = False
    if not valid or int(octets[0], 16) & 1:
        raise DefinitionInvalid(f"{prefix} is not the beginning of a unicast MAC address.")
    rest = [f"{byte:02x}" for byte in secrets.token_bytes(6 - len(octets))]
    return ":".join([f"{int(o, 16):02x}" for o in octets] + rest)


def refuse_uncloneable(root: etree._Element) -> None:
    """Raise where a second machine like this one would write to what is its source's, or could not
    be started beside it: DefinitionInvalid, Unsupported for what QEMU is given past libvirt."""
    for memory in root.iterfind("devices/memory"):
        if memory.get("model") in ("nvdimm", "virtio-pmem"):
            raise DefinitionInvalid(
                f"{root.findtext('name')} keeps data in a memory device "
                f"({memory.get('model')}), which cannot be cloned."
            )
    for loader in root.iterfind("os/loader[@type='pflash']"):
        if loader.text and loader.get("readonly") != "yes":  # libvirt's default is to write
            raise DefinitionInvalid(
                f"{root.findtext('name')} keeps its UEFI variables in the firmware itself "
                f"({loader.text.strip()}), which a clone would write to as well. No clone was "
                "made; make the <loader> read-only, with an <nvram> beside it."
            )
    commandline.refuse_shared(root)


def _drop(root: etree._Element) -> list[LeftOut]:
    left_out = []
    for path, reason in _DROPPED:
        for node in root.findall(path):
            left_out.append(LeftOut(label(node), reason))
            _remove(node)
    for node in writable_directories(root):
        left_out.append(LeftOut(directory(node), "the directory is the source's or shared"))
        _remove(node)
    for path in _DROPPED_SILENTLY:
        for node in root.findall(path):
            _remove(node)
    return left_out


def _keep_or_drop_disks(
    root: etree._Element, disk_paths: Mapping[str, str], keep: Collection[str]
) -> list[LeftOut]:
    left_out = []
    for disk in root.findall("devices/disk"):
        target = disk.find("target")
        name = target.get("dev", "") if target is not None else ""
        if name in disk_paths or name in keep:
            continue
        if disk.get("device") in ("cdrom", "floppy"):
            for source in disk.findall("source"):
                disk.remove(source)
            disk.set("type", "file")
        else:
            left_out.append(LeftOut(name, "the disk is the source's or shared"))
            _remove(disk)
    return left_out


def _identify(root: etree._Element, name: str, uuid: str) -> None:
    try:
        uuids.UUID(uuid)
    except ValueError as error:
        raise DefinitionInvalid(f"{uuid} is not a UUID.") from error
    _set_text(root, "name", name)
    _set_text(root, "uuid", uuid)
    for entry in root.iterfind("sysinfo/system/entry[@name='uuid']"):
        entry.text = uuid
    genid = root.find("genid")
    if genid is not None:
        genid.text = str(uuids.uuid4())


def _own_tpm(root: etree._Element) -> list[LeftOut]:
    """Without a path libvirt keeps a TPM's state under the clone's own UUID, empty at first."""
    backends = root.findall("devices/tpm/backend[@type='emulator']")
    for backend in backends:
        for source in backend.findall("source"):
            backend.remove(source)
    return [LeftOut("tpm", OWN_TPM)] * len(backends)


def _set_nvram(root: etree._Element, path: str | None) -> None:
    nvram = root.find("os/nvram")
    system = root.find("os")
    if nvram is None and system is not None and path and nvram_of(root):
        nvram = etree.SubElement(system, "nvram")  # else libvirt makes one of its own
    if nvram is None:
        return
    for source in nvram.findall("source"):
        nvram.remove(source)
    _unset(nvram, "type")
    nvram.text = path
    if path is None and not nvram.attrib:
        _remove(nvram)


def _renew_interfaces(
    root: etree._Element, prefix: str, known: Mapping[str, str]
) -> dict[str, str]:
    macs: dict[str, str] = {}
    for interface in root.iterfind("devices/interface"):
        mac = interface.find("mac")
        if mac is None:
            mac = etree.SubElement(interface, "mac", address="")
        old = mac.get("address", "")
        new = known.get(old) or random_mac(prefix)
        while new in macs.values():
            new = random_mac(prefix)
        if interface.find("teaming") is not None:  # whose other card has the same address
            new = macs.get(old, new)
        mac.set("address", new)
        _unset(mac, "type", "check")
        macs[old] = new
        _own_port_on_the_host(interface)
    return macs


def _own_port_on_the_host(interface: etree._Element) -> None:
    for target in interface.findall("target"):
        _unset(target, "dev", "managed")  # the host's vnet name
        if not target.attrib:
            interface.remove(target)
    for backend in interface.iterfind("backend"):
        _unset(backend, "logFile")
    for parameters in interface.iterfind("virtualport/parameters"):
        _unset(parameters, "interfaceid")
    for parameter in interface.findall("filterref/parameter"):
        if parameter.get("name") in _OWN_ADDRESSES:
            _remove(parameter)


def _pins(root: etree._Element) -> str:
    """The CPUs of the host that it is pinned to."""
    pinned = [*root.findall("vcpu"), *root.findall("cputune/*")]
    return ", ".join(sorted({each.get("cpuset") or "" for each in pinned} - {""}))


def _own_character_devices(root: etree._Element, old_name: str, name: str) -> list[LeftOut]:
    """Give sockets and log files of serial lines and channels, and files of sound, the clone's own
    paths."""
    left_out = []
    for audio in root.iterfind("devices/audio[@path]"):
        audio.set("path", own_path(audio.get("path", ""), old_name, name))
    for tag in CHARACTER_DEVICES:
        for device in root.findall(f"devices/{tag}"):
            for log in device.findall("log"):
                log.set("file", own_path(log.get("file", ""), old_name, name))
            source = device.find("source")
            _unset(device, "tty")
            if source is None or device.get("type") in ("spicevmc", "spiceport", "qemu-vdagent"):
                continue
            reason = _own_source(device, source, old_name, name)
            if reason:
                left_out.append(LeftOut(label(device), reason))
    return left_out


def _own_source(
    device: etree._Element, source: etree._Element, old_name: str, name: str
) -> str | None:
    """Make one character device's far end the clone's own; a reason if it was lost."""
    kind, path = device.get("type"), source.get("path")
    if device.tag == "channel" and kind == "unix" and source.get("mode", "bind") == "bind":
        _unset(source, "path")  # libvirt makes one per domain
        source.set("mode", "bind")
        return None
    if kind in ("unix", "file") and path and source.get("mode", "bind") == "bind":
        source.set("path", own_path(path, old_name, name))
        return None
    if kind in ("pty", "null", "stdio", "vc"):
        device.remove(source)  # /dev/pts/N of the running source
        return None
    if device.tag == "channel":
        _remove(device)
        return "its far end belongs to one guest"
    device.set("type", "pty")
    device.remove(source)
    for protocol in device.findall("protocol"):
        device.remove(protocol)
    return PSEUDO_TERMINAL


def own_path(path: str, old_name: str, name: str) -> str:
    """`path` for the clone: the source's name in it replaced, or the clone's put before."""
    parts = PurePath(path)
    if old_name and old_name in parts.name:
        return str(parts.with_name(parts.name.replace(old_name, name)))
    return str(parts.with_name(f"{name}-{parts.name}"))


def _own_ports(root: etree._Element) -> None:
    for graphics in root.iterfind("devices/graphics"):
        fixed = graphics.get("port") or graphics.get("tlsPort")
        if graphics.get("type") in ("vnc", "spice", "rdp") and fixed:
            graphics.set("port", "-1")
            graphics.set("autoport", "yes")
            _unset(graphics, "tlsPort")
        if graphics.get("websocket"):
            graphics.set("websocket", "-1")
        _unset(graphics, "socket")
        for listen in graphics.iterfind("listen[@type='socket']"):
            _unset(listen, "socket")
    for vsock_id in root.iterfind("devices/vsock/cid"):
        _unset(vsock_id, "address")
        vsock_id.set("auto", "yes")


def _set_text(root: etree._Element, tag: str, text: str) -> None:
    node = root.find(tag)
    if node is None:
        node = etree.Element(tag)
        root.insert(0, node)
    node.text = text


def _unset(node: etree._Element, *names: str) -> None:
    for name in names:
        if name in node.attrib:
            del node.attrib[name]


def _remove(node: etree._Element) -> None:
    parent = node.getparent()
    if parent is not None:
        parent.remove(node)
