"""Sharing extents on real file systems."""

import os
import subprocess
from pathlib import Path

import pytest

from shared.disks.errors import ReflinkRefused
from shared.disks.reflink import can_reflink, reflink


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_copy_is_equal_private_and_free_of_its_source(on_xfs: Path) -> None:
    """A reflinked file has the same bytes, mode 0600, and does not follow later writes."""
    source, target = on_xfs / "a", on_xfs / "b"
    source.write_bytes(os.urandom(1 << 20))
    before = source.read_bytes()
    free = os.statvfs(on_xfs).f_bavail
    reflink(source, target)
    assert target.read_bytes() == before
    assert target.stat().st_mode & 0o777 == 0o600
    assert (free - os.statvfs(on_xfs).f_bavail) * os.statvfs(on_xfs).f_frsize < 1 << 18
    source.write_bytes(b"other")
    assert target.read_bytes() == before


def test_an_existing_target_is_never_overwritten(on_xfs: Path) -> None:
    """A file that is there already is an error and keeps its contents."""
    (on_xfs / "a").write_text("new")
    (on_xfs / "b").write_text("precious")
    with pytest.raises(FileExistsError):
        reflink(on_xfs / "a", on_xfs / "b")
    assert (on_xfs / "b").read_text() == "precious"


def test_ext4_refuses_and_leaves_nothing(ext4: Path) -> None:
    """Where extents cannot be shared the refusal is clear and no file is left."""
    (ext4 / "a").write_text("x")
    with pytest.raises(ReflinkRefused):
        reflink(ext4 / "a", ext4 / "b")
    assert not (ext4 / "b").exists()


@pytest.mark.parametrize("nocow", [True, False])
def test_btrfs_nocow_sources_clone(btrfs: Path, nocow: bool) -> None:
    """A source with the NOCOW attribute clones into a directory without it, and vice versa."""
    one, other = btrfs / f"one-{nocow}", btrfs / f"other-{nocow}"
    for directory in (one, other):
        directory.mkdir()
    subprocess.run(["chattr", "+C", str(one if nocow else other)], check=True)
    (one / "a").write_bytes(os.urandom(1 << 20))
    reflink(one / "a", other / "b")
    assert (other / "b").read_bytes() == (one / "a").read_bytes()


def test_probe_tells_the_file_systems_apart(xfs: Path, btrfs: Path, ext4: Path) -> None:
    """The probe says yes within XFS and btrfs, no on ext4 and across file systems."""
    assert can_reflink(xfs, xfs)
    assert can_reflink(btrfs, btrfs)
    assert not can_reflink(ext4, ext4)
    assert not can_reflink(xfs, btrfs)
    assert not list(xfs.glob(".triptych-probe-*"))
