"""What qemu-img says about an image: its size, its health, what a copy will need.

What the length or the header of a plain file tells is read here: to start qemu-img takes 7 ms. A
disk's format is always given, never probed: a guest can write any header
into a raw disk, and a probe would then follow a backing file of its choosing.
"""

import json
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.disks.errors import CopyFailed, ImageDamaged
from shared.disks.qcow2 import plainly_sound

# Formats that qemu-img can check; raw and others have no structure to check.
CHECKABLE = {"qcow2", "qed", "vdi", "vhdx", "vmdk", "parallels"}
_TIMEOUT_S = 600
_SECTOR = 512
# docs/interop/qcow2.txt of QEMU: magic, version, offset and length of the backing file's name,
# cluster bits, virtual size; for version 3 the features that a reader must know, at byte 72.
_QCOW2 = struct.Struct(">4sIQIIQ")
_FEATURES = struct.Struct(">Q")
_FEATURES_AT = 72
_KNOWN_FEATURES = 0b11001
"""Dirty, compression type, extended L2 entries: none makes it depend on another file."""


@dataclass(frozen=True)
class ImageInfo:
    """`virtual_bytes` is what the guest sees, `allocated_bytes` what the file takes up.

    `depends_on` names a backing or data file without which the file is no disk.
    """

    format: str
    virtual_bytes: int
    allocated_bytes: int
    depends_on: str | None


def info(path: Path, image_format: str) -> ImageInfo:
    """Read an image's header, also while QEMU has it open. Raises CopyFailed."""
    if path.is_file():
        virtual = virtual_bytes(path, image_format, alone=True)
        if virtual is not None:
            return ImageInfo(image_format, virtual, path.stat().st_blocks * _SECTOR, None)
    answer = _ask(["info", "-U", "-f", image_format, "--output=json"], path)
    extra = answer.get("format-specific", {}).get("data", {})
    return ImageInfo(
        format=str(answer["format"]),
        virtual_bytes=int(answer["virtual-size"]),
        allocated_bytes=int(answer.get("actual-size", 0)),
        depends_on=answer.get("full-backing-filename")
        or answer.get("backing-filename")
        or extra.get("data-file"),
    )


def chain(path: Path, image_format: str) -> list[Path]:
    """The files that an image depends on, however far down; none that is not there.

    Where qemu-img cannot follow it to its end, as far as the image itself tells. Raises
    CopyFailed for one that cannot be read.
    """
    first = info(path, image_format).depends_on
    if first is None:
        return []
    command = ["info", "-U", "--backing-chain", "-f", image_format, "--output=json"]
    try:
        links: list[dict[str, Any]] = _ask(command, path)
    except CopyFailed:
        links = []
    found = [Path(first)]
    for link in links:
        data = link.get("format-specific", {}).get("data", {}).get("data-file")
        found += [Path(each) for each in (link["filename"], data) if each]
    beside = (path.parent / each for each in found)  # an absolute one stays what it is
    return list(dict.fromkeys(each for each in beside if each.exists() and each != path))


def virtual_bytes(path: Path, image_format: str, *, alone: bool = False) -> int | None:
    """The size that the guest sees, from a file's length or qcow2 header; None if that tells none.

    With `alone`, None also for an image that needs another file, or may. Raises OSError.
    """
    if image_format == "raw":
        return -(-path.stat().st_size // _SECTOR) * _SECTOR  # as QEMU rounds it
    if image_format != "qcow2":
        return None
    with path.open("rb") as file:
        header = file.read(_FEATURES_AT + _FEATURES.size)
    if len(header) < _FEATURES_AT + _FEATURES.size:
        header = header.ljust(_FEATURES_AT + _FEATURES.size, b"\0")
    magic, version, backing, _, _, size = _QCOW2.unpack_from(header)
    (features,) = _FEATURES.unpack_from(header, _FEATURES_AT)
    if magic != b"QFI\xfb":
        return None
    if alone and (version != 3 or backing or features & ~_KNOWN_FEATURES):
        return None
    return int(size)


def check(path: Path, image_format: str) -> None:
    """Check an image that nobody writes, the quick way where it is plain. Raises ImageDamaged."""
    if image_format == "qcow2" and plainly_sound(path):
        return
    check_by_qemu(path, image_format)


def check_by_qemu(path: Path, image_format: str) -> None:
    """Have qemu-img check an image that nobody writes. Raises ImageDamaged.

    Leaked clusters waste space and harm nothing: qemu-img's exit status 3 passes.
    """
    if image_format not in CHECKABLE:
        return
    command = ["qemu-img", "check", "-f", image_format, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode not in (0, 3):
        told = (done.stderr or done.stdout).strip().splitlines()
        raise ImageDamaged(
            f"{path.name} did not pass qemu-img check: {told[-1] if told else 'no reason given'}. "
            "It is not used."
        )


def measure(path: Path, image_format: str, target_format: str) -> int:
    """The bytes a full, flattened copy in `target_format` takes at most. Raises CopyFailed.

    Without internal snapshots and bitmaps, which a copy does not hold either.
    """
    answer = _ask(["measure", "-U", "-f", image_format, "-O", target_format, "--output=json"], path)
    return int(answer["required"])


def _ask(arguments: list[str], path: Path) -> Any:
    command = ["qemu-img", *arguments, str(path)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except FileNotFoundError as error:
        raise CopyFailed("qemu-img is not installed; install qemu-utils.") from error
    except subprocess.TimeoutExpired as error:
        raise CopyFailed(f"qemu-img did not answer about {path.name}.") from error
    except subprocess.CalledProcessError as error:
        raise CopyFailed(f"{path.name} cannot be read: {error.stderr.strip()}.") from error
    return json.loads(done.stdout)
