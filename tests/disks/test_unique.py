"""What of a file would be freed by its deletion, on real file systems."""

import os
from pathlib import Path

import pytest
from operations.waiting import wait_for

from lab.filesystems import MIB
from shared.disks.extents import unique_bytes
from shared.disks.reflink import reflink


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_only_what_nobody_else_has(kind: str, request: pytest.FixtureRequest) -> None:
    """What was written to either side after they were shared is that side's own."""
    folder: Path = request.getfixturevalue(kind)
    disk, copy = folder / "unique-disk", folder / "unique-copy"
    disk.write_bytes(os.urandom(4 * MIB))
    assert unique_bytes(disk) == allocated(disk)
    reflink(disk, copy)
    assert (unique_bytes(disk), unique_bytes(copy)) == (0, 0)

    with disk.open("r+b") as file:
        file.write(os.urandom(MIB))
    os.sync()
    assert unique_bytes(disk) == MIB
    # btrfs frees an extent as a whole, and so it says of a part that it is still shared.
    assert unique_bytes(copy) == (MIB if kind == "xfs" else unique_bytes(copy))

    disk.unlink()
    wait_for(lambda: unique_bytes(copy) == allocated(copy) == 4 * MIB)  # XFS frees it later


def test_preallocated_room_counts(xfs: Path) -> None:
    """It would be freed too."""
    path = xfs / "unique-preallocated"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
    assert unique_bytes(path) == MIB


@pytest.mark.parametrize("place", ["ext4", "tmpfs"])
def test_where_nothing_is_shared(place: str, request: pytest.FixtureRequest) -> None:
    """It is all that the file takes up, also where no extents are told."""
    folder = Path("/dev/shm") if place == "tmpfs" else request.getfixturevalue("ext4")  # noqa: S108
    path = folder / f"triptych-test-{os.urandom(4).hex()}.raw"
    try:
        with path.open("wb") as file:
            file.write(os.urandom(MIB))
            file.truncate(8 * MIB)
            os.fsync(file.fileno())
        assert unique_bytes(path) == allocated(path) >= MIB
    finally:
        path.unlink()
