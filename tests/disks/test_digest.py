"""BLAKE3 of a disk: what plain `b3sum` says, holes included."""

from pathlib import Path

import pytest
from blake3 import blake3

from shared.disks.digest import digest
from shared.errors import Cancelled

MIB = 2**20


def test_a_sparse_disk_has_the_digest_of_what_it_reads_as(tmp_path: Path) -> None:
    """Holes at the start, in the middle and at the end count as zeros."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for offset in (5 * MIB + 4096, 11 * MIB):
            file.seek(offset)
            file.write(b"triptych" * 512)
        file.truncate(23 * MIB + 100)

    assert blake3(disk.read_bytes()).hexdigest() == digest(disk)


def test_one_flipped_byte_changes_it(tmp_path: Path) -> None:
    """A flipped byte anywhere is a different digest."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(3 * MIB))
    before = digest(disk)
    with disk.open("r+b") as file:
        file.seek(2 * MIB + 7)
        file.write(b"\x01")

    assert digest(disk) != before


def test_it_stops_when_told(tmp_path: Path) -> None:
    """A cancel takes effect at the next chunk."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(9 * MIB))
    seen: list[int] = []

    with pytest.raises(Cancelled):
        digest(disk, seen.append, lambda: len(seen) > 0)

    assert len(seen) == 1
