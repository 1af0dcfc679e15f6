"""What a domain gives QEMU past libvirt (`qemu:commandline`, `qemu:override`), and what of it two
machines cannot share.

libvirt looks at nothing there: no lock, no label, no port of its choosing. Owns: reading these
options, naming the storage in them, and making them a clone's. Pure lxml, but for a look at whether
a path is a directory's. Options and their properties:
https://www.qemu.org/docs/master/system/invocation.html
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lxml import etree

from shared.errors import Unsupported

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_ARGUMENTS = f"{_QEMU}commandline/{_QEMU}arg"
_PROPERTIES = f"{_QEMU}override/{_QEMU}device/{_QEMU}frontend/{_QEMU}property"

_OPTION = re.compile(r"--?[A-Za-z]")
_FLAGS = (
    *("S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize"),
    *("enable-fips", "enable-kvm", "enable-sync-profile", "full-screen", "h", "help"),
    *("mem-prealloc", "no-acpi", "no-fd-bootchk", "no-frame", "no-hpet", "no-kvm"),
    *("no-kvm-irqchip", "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults"),
    *("nographic", "only-migratable", "portrait", "preconfig", "s", "sdl", "semihosting"),
    *("singlestep", "snapshot", "tdf", "usb", "version", "win2k-hack", "xen-attach"),
    *("xen-domid-restrict",),
)
"""Those that take no value."""
_FIRST_IS = {
    "audiodev": "driver",
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "fsdev": "fsdriver",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "tpmdev": "type",
    "virtfs": "fsdriver",
}
"""The property that the first word of a value is."""
_DISKS = ("hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash", "cdrom")
_ELSEWHERE = (
    *("ftp", "ftps", "gluster", "http", "https", "iscsi", "nbd", "nfs", "nvme", "rbd"),
    *("sheepdog", "ssh", "vvfat"),
)
"""Drivers of disks that have no file of their own."""
_MEMORY = ("/dev/shm", "/dev/hugepages")  # noqa: S108  a worker's container may lack them
_ON = ("on", "true", "yes", "y")

# Of these nothing is written, whatever path they name.
_READING = (
    *("acpitable", "append", "audio", "audiodev", "bios", "boot", "chroot", "dtb", "fw_cfg"),
    *("initrd", "k", "kernel", "L", "M", "machine", "mem-path", "option-rom", "plugin", "shim"),
    *("smbios",),
)
_READING_OBJECTS = ("secret", "tls-", "rng-random", "memory-backend-file", "authz-")
_READING_DEVICES = ("loader", "guest-loader")
# Far ends that are the machine's own.
_CHARACTERS = (
    *("null", "vc", "pty", "stdio", "none", "msmouse", "braille", "ringbuf", "memory"),
    *("spicevmc", "spiceport", "testdev", "wctablet", "qemu-vdagent"),
)
_DROPPED = ("vnc", "spice", "gdb", "s", "qmp", "qmp-pretty", "redir", "incoming")
_WRITTEN = ("pidfile", "D", "writeconfig", "dump-vmstate")
_LINES = ("serial", "parallel", "debugcon", "monitor")
_CARDS = ("netdev", "nic", "net")
_MACS = ("mac", "macaddr")
_HARMLESS_SETTING = re.compile(r"device\.[^=]*\.(?!(drive|mac|memdev|host|sysfsdev)=)[^.=]+=")
_HOSTS_DEVICES = ("vfio-", "usb-host", "vhost-user-", "vhost-scsi", "vhost-vdpa", "vhost-vsock")

_ONE_GUESTS = "its port, socket or file on the host belongs to one guest"
_AS_A_DISK = "two machines would write to it; make it a <disk> of the domain"
_AS_A_DIRECTORY = "two machines would write to it; make it a <filesystem> of the domain"
_AS_A_CARD = "its place in the host's network belongs to one guest; make it an <interface>"
_AS_A_DEVICE = "it belongs to one guest; make it a device of the domain, such as <hostdev>"


@dataclass(frozen=True)
class Storage:
    """A disk (a file, a device, one over the network) that is named there.

    `path` is a path of the host's, where it is one; `format` as given, else None.
    """

    told: str
    path: str | None
    format: str | None
    writable: bool


@dataclass
class Own:
    """What became of the options of a clone: those it goes without, those that are as its
    source's, and the addresses of its cards, by its source's."""

    left_out: list[tuple[str, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    macs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Option:
    name: str
    value: str
    nodes: tuple[etree._Element, ...]

    @property
    def properties(self) -> dict[str, str]:
        """Those in its value, by name; `a.b` for `b` in `a`."""
        if self.value.lstrip().startswith("{"):
            try:
                return dict(_flat(json.loads(self.value)))
            except ValueError:
                return {}
        found: dict[str, str] = {}
        for part in _parts(self.value):
            key, is_set, text = part.partition("=")
            if not is_set:
                first = None if found else _FIRST_IS.get(self.name)
                key, text = (first, part) if first else (part, "on")
            found[key] = text  # of two the last one counts
        return found

    @property
    def kind(self) -> str:
        return self.properties.get(_FIRST_IS.get(self.name, ""), "")

    def told(self, more: str = "") -> str:
        return f"-{self.name} {more}".strip()

    def change(self, change: dict[str, str | None]) -> None:
        """Set these properties of its value; without those that are None."""
        if self.value.lstrip().startswith("{"):
            given = {**json.loads(self.value), **change}
            text = json.dumps({key: each for key, each in given.items() if each is not None})
        else:
            parts = []
            for part in _parts(self.value):
                key = part.partition("=")[0]
                if change.get(key, "") is not None:
                    part = f"{key}={change[key]}" if key in change else part
                    parts.append(part.replace(",", ",,"))
            there = {part.partition("=")[0] for part in parts}
            parts += [f"{key}={text}" for key, text in change.items() if text and key not in there]
            text = ",".join(parts)
        self.set(text)

    def set(self, value: str) -> None:
        self.nodes[-1].set("value", value)

    def remove(self) -> None:
        for node in self.nodes:
            parent = node.getparent()
            if parent is not None:
                parent.remove(node)


def storage(root: etree._Element) -> list[Storage]:
    """The disks that are named there, which no copy holds."""
    return [found for each in _options(root) if (found := _storage(each))]


def has_network_card(root: etree._Element) -> bool:
    return any(each.name in _CARDS and each.kind != "none" for each in _options(root))


def refuse_shared(root: etree._Element) -> None:
    """Raise Unsupported where a second machine with these options would write to what is its
    source's, or could not be started beside it."""
    reasons = [f"{told} ({reason})" for each in _options(root) for told, reason in _obstacles(each)]
    for node in root.iterfind(_PROPERTIES):
        if node.get("name") in ("drive", "memdev", "host", "sysfsdev"):
            reasons.append(f"qemu:override {node.get('name')} ({_AS_A_DEVICE})")
    if reasons:
        raise Unsupported(
            f"{root.findtext('name')} has something on QEMU's command line (qemu:commandline) that "
            f"a clone cannot have too: {'; '.join(reasons)}. No clone was made."
        )


def macs(root: etree._Element) -> list[str]:
    """The addresses of the network cards that are there."""
    cards = (each.properties for each in _options(root) if each.name in ("device", "nic", "net"))
    return [given[key] for given in cards for key in _MACS if key in given]


def make_own(root: etree._Element, new_mac: Callable[[str], str]) -> Own:
    """Make the options those of another machine, in place; `new_mac` tells a card's address by its
    source's. They are such that `refuse_shared` lets through."""
    own = Own()
    for each in _options(root):
        before = len(own.left_out)
        _make_own(each, own, new_mac)
        if len(own.left_out) == before and each.told() not in own.kept:
            own.kept.append(each.told())
    for node in root.findall(_PROPERTIES):
        if node.get("name") == "mac":  # the clone's own, from its definition
            parent = node.getparent()
            if parent is not None:
                parent.remove(node)
    return own


def _options(root: etree._Element) -> list[_Option]:
    nodes = root.findall(_ARGUMENTS)
    found = []
    while nodes:
        node = nodes.pop(0)
        text = node.get("value", "")
        if not _OPTION.match(text):  # as QEMU reads it
            found.append(_Option("hda", text, (node,)))
            continue
        name = text.lstrip("-")
        # Should a value look like an option, it is read as one: that hides nothing.
        if nodes and name not in _FLAGS and not _OPTION.match(nodes[0].get("value", "")):
            found.append(_Option(name, nodes[0].get("value", ""), (node, nodes.pop(0))))
        else:
            found.append(_Option(name, "", (node,)))
    return found


def _storage(option: _Option) -> Storage | None:
    given = option.properties
    read_only = given.get("readonly", given.get("read-only", "off")) in _ON
    if option.name in _DISKS:
        path = option.value
        read_only = option.name == "cdrom"
    elif option.name == "usbdevice" and option.value.startswith("disk:"):
        path = option.value.removeprefix("disk:")
    elif option.name in ("drive", "blockdev"):
        found = _image(option, given)
        if found is None:
            return None
        path = found
        read_only = read_only or given.get("media") == "cdrom" or given.get("snapshot") in _ON
    elif option.kind == "memory-backend-file" and given.get("share") in _ON:
        path = given.get("mem-path", "")
        if path.rstrip("/") in _MEMORY or Path(path).is_dir():
            return None  # a file without a name, gone with the guest
    else:
        return None
    return Storage(
        told=option.told(path),
        path=path if path.startswith("/") else None,
        format=given.get("format") or (option.kind if option.name == "blockdev" else None),
        writable=not read_only,
    )


def _image(option: _Option, given: dict[str, str]) -> str | None:
    """The path or address of a -drive or -blockdev; None where there is none to share."""
    last = [(key.split(".")[-1], text) for key, text in given.items()]
    paths = [text for key, text in last if key == "filename"]
    if option.name == "drive" and "file" in given:  # with -blockdev that is another's name
        paths.insert(0, given["file"])
    if paths:
        return None if paths[0].startswith("null-") else paths[0]
    return next((text for key, text in last if key == "driver" and text in _ELSEWHERE), None)


def _obstacles(option: _Option) -> Iterator[tuple[str, str]]:
    """What a clone cannot have too, and why."""
    found, given, kind = _storage(option), option.properties, option.kind
    if found:
        if found.writable:
            yield found.told, _AS_A_DISK
    elif option.name in ("fsdev", "virtfs"):
        if kind != "synth" and given.get("readonly") not in _ON:
            yield option.told(given.get("path", kind)), _AS_A_DIRECTORY
    elif (option.name == "device" and kind.startswith(_HOSTS_DEVICES)) or option.name == "tpmdev":
        yield option.told(kind), _AS_A_DEVICE
    elif option.name in _CARDS and not _is_shareable_card(kind, given):
        yield option.told(kind), _AS_A_CARD
    elif _may_lead_elsewhere(option):
        yield option.told(option.value), "what it leads to is not known; take it out"


def _is_shareable_card(kind: str, given: dict[str, str]) -> bool:
    if kind == "tap":
        return not given.keys() & {"ifname", "fd", "fds", "vhostfd", "vhostfds"}
    return kind in ("user", "bridge", "hubport", "nic", "none")


def _may_lead_elsewhere(option: _Option) -> bool:
    """Whether a path is named, and what for is not known here; or another option is changed."""
    given = option.properties
    if option.name == "readconfig":
        return True
    if option.name == "set":
        return not _HARMLESS_SETTING.match(option.value)
    if option.name == "audiodev":
        return option.kind == "wav"
    if option.name in (*_READING, *_DROPPED, *_WRITTEN, *_LINES, *_CARDS, "chardev", "display"):
        return False
    if option.name == "object" and option.kind.startswith(_READING_OBJECTS):
        return False
    if option.name == "device" and option.kind in _READING_DEVICES:
        return False
    return any("/" in f"{key}{text}" for key, text in given.items() if key != "romfile")


def _make_own(option: _Option, own: Own, new_mac: Callable[[str], str]) -> None:
    given, kind = option.properties, option.kind
    if _is_left(option):
        option.remove()
        own.left_out.append((option.told(), _ONE_GUESTS))
    elif option.name in _LINES and not _is_own_line(option.value):
        option.set("null")
        own.left_out.append((option.told(option.value.split(":")[0]), _ONE_GUESTS))
    elif option.name == "chardev" and (kind not in _CHARACTERS or {"path", "logfile"} & set(given)):
        option.set(",".join(["null", *(f"{k}={given[k]}" for k in ("id", "mux") if k in given)]))
        own.left_out.append((option.told(kind), _ONE_GUESTS))
    elif option.name in _CARDS and {"hostfwd", "smb"} & set(given):
        option.change({"hostfwd": None, "smb": None, "smbserver": None})
        for key in ("hostfwd", "smb"):
            if key in given:
                own.left_out.append((option.told(f"{kind},{key}"), _ONE_GUESTS))
    for key in _MACS:
        if option.name in ("device", "nic", "net") and key in given:
            own.macs[given[key]] = new_mac(given[key])
            _current(option).change({key: own.macs[given[key]]})
    if lacks := _lacks_mac(option):  # QEMU would give it the one that it gives its source's
        _current(option).change({lacks: new_mac("")})


def _lacks_mac(option: _Option) -> str | None:
    """The property for its address, of a card that has none given."""
    given = option.properties
    if any(key in given for key in _MACS):
        return None
    if (option.name == "device" and "netdev" in given) or (
        option.name == "nic" and option.kind not in ("user", "none")
    ):
        return "mac"
    return "macaddr" if option.name == "net" and option.kind == "nic" else None


def _current(option: _Option) -> _Option:
    """The same with its value as it is by now."""
    return _Option(option.name, option.nodes[-1].get("value", ""), option.nodes)


def _is_left(option: _Option) -> bool:
    if option.name == "display":
        return option.value.startswith(("vnc", "spice-app", "dbus"))
    if option.name == "vnc" and option.value == "none":
        return False
    return option.name in (*_DROPPED, *_WRITTEN)


def _is_own_line(value: str) -> bool:
    kind = value.removeprefix("mon:").split(":")[0].split(",")[0]
    return kind in (*_CHARACTERS, "chardev")


def _parts(value: str) -> list[str]:
    """Split at commas; a doubled one stands for itself."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",") if part]


def _flat(document: Any, within: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", str(value).lower() if isinstance(value, bool) else str(value)
