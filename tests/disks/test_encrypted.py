"""Disks that are encrypted by QEMU: nobody here has their keys."""

import subprocess
from pathlib import Path

import pytest

from lab.qemu_img import encrypted
from shared.disks import images
from shared.disks.copied import CopiedDisk
from shared.disks.errors import CopyFailed
from shared.disks.materialise import materialise, needed_bytes

MIB = 1 << 20


def stored(path: Path) -> CopiedDisk:
    return CopiedDisk("vda", path, "qcow2", 32 * MIB, path.stat().st_blocks * 512)


def test_what_needs_no_key_is_known(tmp_path: Path) -> None:
    """Its size, and that it is encrypted; it is neither called damaged nor written to."""
    disk = encrypted(tmp_path / "a.qcow2")
    before = disk.read_bytes()
    images.count_anew(disk, "qcow2")
    images.check(disk, "qcow2")
    images.check_by_qemu(disk, "qcow2")
    assert images.info(disk, "qcow2") == images.ImageInfo("qcow2", 32 * MIB, None, encrypted=True)
    assert disk.read_bytes() == before


def test_the_old_kind_is_known_too(tmp_path: Path) -> None:
    """AES, which QEMU itself refuses to use."""
    disk = tmp_path / "old.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "32M"], check=True)
    with disk.open("r+b") as file:
        file.seek(32)
        file.write((1).to_bytes(4, "big"))
    images.check(disk, "qcow2")
    assert images.info(disk, "qcow2").encrypted
    amended = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", disk, "32M"]
    subprocess.run(amended, check=True)
    assert not images.info(disk, "qcow2").encrypted


def test_it_is_put_back_byte_by_byte(on_xfs: Path, tmp_path: Path) -> None:
    """Where extents are shared, and where they are not."""
    disk = encrypted(on_xfs / "a.qcow2")
    assert materialise([stored(disk)], {"vda": on_xfs / "b.qcow2"}) == "reflink"
    need = needed_bytes([stored(disk)], {"vda": tmp_path})["vda"]
    assert materialise([stored(disk)], {"vda": tmp_path / "b.qcow2"}) == "stream"
    assert (on_xfs / "b.qcow2").read_bytes() == disk.read_bytes()
    streamed = tmp_path / "b.qcow2"
    assert streamed.read_bytes().rstrip(b"\0") == disk.read_bytes().rstrip(b"\0")
    assert 0 < streamed.stat().st_blocks * 512 <= need < 32 * MIB


def test_another_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """It would be of what only the key opens."""
    disk = encrypted(tmp_path / "a.qcow2")
    with pytest.raises(CopyFailed, match="encrypted"):
        materialise([stored(disk)], {"vda": tmp_path / "b.raw"}, formats={"vda": "raw"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.qcow2"]
