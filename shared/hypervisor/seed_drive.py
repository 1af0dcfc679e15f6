"""The drive that a cloud-init seed stands in.

Owns: whether a definition has had one, and putting one in. It goes on the bus of the guest's
first disk, whose driver the guest has for sure: kernels made for clouds have been without those
of IDE and SATA, where a CD-ROM would be. cloud-init knows a seed by its label, on any drive.
"""

import re
from pathlib import Path

from lxml import etree

from shared.hypervisor.definition import parse_domain, to_text
from shared.hypervisor.errors import DefinitionInvalid

SUFFIX = "-seed.iso"
"""Of the file's name, where it is one of ours."""
_PREFIXES = {"virtio": "vd", "ide": "hd", "scsi": "sd", "sata": "sd", "usb": "sd"}
_SERIAL = "sysinfo/system/entry[@name='serial']"
_TOLD = re.compile(r"(?<!\S)ds=nocloud(-net)?(;\S*)?(?!\S)")
_LABELS = (b"cidata", b"CIDATA")
# ECMA-119: the volume descriptor is the 16th sector, and its label begins at byte 40 of it.
_LABEL_AT, _LABEL_LENGTH = 16 * 2048 + 40, 32


def had_seed(definition: str) -> bool:
    """Whether a domain of that definition is told of a NoCloud seed: by a drive or by SMBIOS."""
    root = parse_domain(definition)
    entries = [entry.text or "" for entry in root.iterfind(_SERIAL)]
    if any(entry.startswith("ds=nocloud") for entry in entries):
        return True
    sources = root.iterfind("devices/disk/source[@file]")
    return any(_is_seed(Path(source.get("file", ""))) for source in sources)


def with_seed(definition: str, seed: Path) -> str:
    """The definition with a read-only drive that holds the file `seed`.

    What SMBIOS or the kernel's command line tells cloud-init goes: it comes before what a drive
    says, the instance-id too, and a seed that it names is fetched in place of the drive's
    (cloud-init's DataSourceNoCloud).
    Raises DefinitionInvalid where there is no disk to tell a bus by, or no place on it.
    """
    root = parse_domain(definition)
    for path in (_SERIAL, "os/cmdline"):
        for node in root.iterfind(path):
            node.text = _TOLD.sub("ds=nocloud", node.text or "")
    devices = root.find("devices")
    disks = root.findall("devices/disk")
    first = next((disk for disk in disks if disk.get("device", "disk") == "disk"), None)
    target = first.find("target") if first is not None else None
    bus = target.get("bus", "") if target is not None else ""
    if devices is None or bus not in _PREFIXES:
        raise DefinitionInvalid(
            f"There is no bus for a cloud-init seed: the first disk is on {bus or 'none'}."
        )
    taken = {node.get("dev") for node in root.iterfind("devices/disk/target")}
    names = (f"{_PREFIXES[bus]}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
    name = next((name for name in names if name not in taken), None)
    if name is None or (bus == "ide" and name > "hdd"):
        raise DefinitionInvalid(f"There is no place for a cloud-init seed on the bus {bus}.")
    device = "disk" if bus in ("virtio", "usb") else "cdrom"
    drive = etree.SubElement(devices, "disk", type="file", device=device)
    etree.SubElement(drive, "driver", name="qemu", type="raw")
    # The seed goes with the clone, whose image may bring it back: it starts without the drive then.
    etree.SubElement(drive, "source", file=str(seed), startupPolicy="optional")
    etree.SubElement(drive, "target", dev=name, bus=bus)
    etree.SubElement(drive, "readonly")
    return to_text(root)


def _is_seed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(_LABEL_AT)
            return file.read(_LABEL_LENGTH).strip() in _LABELS
    except FileNotFoundError:  # it went with its clone, and the definition is from an image
        return path.name.endswith(SUFFIX)
    except OSError:
        return False
