"""What qemu-img says about an image: its size, its health, what a copy will need.

What the length or the header of a plain file tells is read here: to start qemu-img takes 7 ms. A
disk's format is always given, never probed: a guest can write any header
into a raw disk, and a probe would then follow a backing file of its choosing.
"""

import json
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shared.disks.errors import CopyFailed, ImageDamaged, InsufficientSpace
from shared.disks.qcow2 import below, plainly_sound
from shared.disks.qemu_img import run
from shared.disks.space import says_full

# Formats that qemu-img can check; raw and others have no structure to check.
CHECKABLE = {"qcow2", "qed", "vdi", "vhdx", "vmdk", "parallels"}
_TIMEOUT_S = 600
_LAST_VERDICT = 63
"""Exit statuses of `qemu-img check`: 0 sound, 1 not done, 2 damaged, 3 leaks, 63 cannot be checked;
what is higher is its starter's (setpriv(1))."""
_SECTOR = 512
# docs/interop/qcow2.txt of QEMU: magic, version, offset and length of the backing file's name,
# cluster bits, virtual size, kind of encryption, and, past four places of tables, the number of
# snapshots; for version 3 the features that a reader must know, at byte 72.
_QCOW2 = struct.Struct(">4sIQIIQI24xI")
_FEATURES = struct.Struct(">Q")
_FEATURES_AT = 72
INSIDE_NOT_COPIED = "the snapshots inside its image (virsh snapshot-create) are not copied"
_DIRTY = 0b1
_KNOWN_FEATURES = 0b11000 | _DIRTY
"""Dirty, compression type, extended L2 entries: none makes it depend on another file."""


@dataclass(frozen=True)
class ImageInfo:
    """`virtual_bytes` is what the guest sees; `depends_on` names a backing or data file without
    which the file is no disk. What is `encrypted` in the image's format qemu-img does not open
    without its key, but for its header."""

    format: str
    virtual_bytes: int
    depends_on: str | None
    encrypted: bool = False


def info(path: Path, image_format: str) -> ImageInfo:
    """Read an image's header, also while QEMU has it open. Raises CopyFailed."""
    if path.is_file():
        virtual = virtual_bytes(path, image_format, alone=True)
        if virtual is not None:
            return ImageInfo(image_format, virtual, None, is_encrypted(path, image_format))
    answer = _ask(["info", "-U", "-f", image_format, "--output=json"], path)
    extra = answer.get("format-specific", {}).get("data", {})
    return ImageInfo(
        format=str(answer["format"]),
        virtual_bytes=int(answer["virtual-size"]),
        depends_on=answer.get("full-backing-filename")
        or answer.get("backing-filename")
        or extra.get("data-file"),
        encrypted=bool(answer.get("encrypted")),
    )


def chain(path: Path, image_format: str) -> list[Path]:
    """The files that an image depends on, however far down; none that is not there.

    Where qemu-img cannot follow it to its end, as far as the image itself tells. Raises
    CopyFailed for one that cannot be read.
    """
    plain = below(path) if image_format == "qcow2" and path.is_file() else None
    if plain is not None:
        return [each for each in plain if each.exists()]
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
    if image_format != "qcow2" or (header := _header(path)) is None:
        return None
    if alone and (header.version != 3 or header.backing or header.features & ~_KNOWN_FEATURES):
        return None
    return header.virtual_bytes


def wrong_size(path: Path, image_format: str, expected: int) -> str | None:
    """What is wrong with the size that the guest sees of a raw or qcow2 image, in bytes; None if it
    is as expected, or the format does not tell. Raises OSError."""
    if image_format not in ("raw", "qcow2"):
        return None
    size = virtual_bytes(path, image_format)
    if size == expected:
        return None
    told = "no readable header" if size is None else f"{size} bytes"
    return f"has {told}, the manifest says {expected} bytes"


def is_encrypted(path: Path, image_format: str) -> bool:
    """Whether it is a qcow2 that nothing is read from without its key. Raises OSError."""
    header = _header(path) if image_format == "qcow2" else None
    return header is not None and header.encryption != 0


def has_snapshots_inside(path: Path, image_format: str) -> bool:
    """Whether it is a qcow2 that holds snapshots, as libvirt's internal ones. Raises OSError."""
    header = _header(path) if image_format == "qcow2" and path.is_file() else None
    return header is not None and header.snapshots > 0


class _Header(NamedTuple):
    version: int
    backing: int
    virtual_bytes: int
    encryption: int
    snapshots: int
    features: int
    """None of them below version 3."""


def _header(path: Path) -> _Header | None:
    """The start of a qcow2; None if it is none. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(_FEATURES_AT + _FEATURES.size)
    data = data.ljust(_FEATURES_AT + _FEATURES.size, b"\0")
    magic, version, backing, _, _, size, encryption, snapshots = _QCOW2.unpack_from(data)
    if magic != b"QFI\xfb":
        return None
    (features,) = _FEATURES.unpack_from(data, _FEATURES_AT)
    known = features if version >= 3 else 0
    return _Header(version, backing, size, encryption, snapshots, known)


def count_anew(path: Path, image_format: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Count the references to the clusters of a qcow2 that is not counted while it is in use.

    So it is with `lazy_refcounts`: QEMU marks the image as dirty, and counts when it closes it,
    or, where it was killed, when it opens it again. What nobody writes and is not dirty is left
    as it is, and what is encrypted for QEMU to count. Whether the outcome is sound is for `check`
    to say. Raises InsufficientSpace, CopyFailed where there is no qemu-img.
    """
    header = _header(path) if image_format == "qcow2" else None
    if header is None or header.encryption or not header.features & _DIRTY:
        return
    status, complaint = run(["check", "-q", "-r", "all", "-f", image_format, str(path)], meanwhile)
    if status and says_full(complaint):
        raise InsufficientSpace(
            f"The file system of {path.parent} became full. The copy was not kept; make room and "
            "try again."
        )


def check(path: Path, image_format: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Check an image that nobody writes, the quick way where it is plain. Raises ImageDamaged, and
    what `meanwhile` does."""
    if image_format == "qcow2" and plainly_sound(path):
        return
    check_by_qemu(path, image_format, meanwhile)


def check_by_qemu(
    path: Path, image_format: str, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Have qemu-img check an image that nobody writes, which takes minutes for terabytes. What
    `meanwhile` raises ends it. Raises ImageDamaged, and CopyFailed where qemu-img came to no end.

    Leaked clusters waste space and harm nothing: qemu-img's exit status 3 passes. So does what is
    encrypted, which qemu-img cannot judge.
    """
    if image_format not in CHECKABLE or is_encrypted(path, image_format):
        return
    status, complaint = run(["check", "-f", image_format, str(path)], meanwhile)
    if status < 0 or status > _LAST_VERDICT:
        raise CopyFailed(f"qemu-img check of {path.name} was killed before it came to an end.")
    if status not in (0, 3):
        told = complaint.splitlines()
        raise ImageDamaged(
            f"{path.name} did not pass qemu-img check: {told[-1] if told else 'no reason given'}. "
            "It is not used."
        )


def measure(path: Path, image_format: str, target_format: str) -> int:
    """The bytes a full, flattened copy in `target_format` takes at most. Raises CopyFailed.

    Without internal snapshots and bitmaps, which a copy does not hold either, and without holes:
    for a raw copy qemu-img tells its whole length.
    """
    arguments = ["measure", "-U", "-f", image_format, "--output=json", "-O"]
    required = int(_ask([*arguments, target_format], path)["required"])
    if target_format == "raw":
        required = min(required, int(_ask([*arguments, "qcow2"], path)["required"]))
    return required


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
