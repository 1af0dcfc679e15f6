"""A full file system: whatever was being written, it is said as such and nothing is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from lab import filesystems
from services.cloner.identity.by_seed import write_seed
from shared.disks import setaside
from shared.disks.beside import SmallFile, copy_small
from shared.disks.copied import CopiedDisk
from shared.disks.copy import stream_copy
from shared.disks.errors import InsufficientSpace
from shared.disks.materialise import materialise
from shared.disks.reflink import clone_ranges, create_target, reflink
from shared.manifest import Manifest, ManifestDisk, ManifestServer, read_manifest
from shared.manifest import write_manifest as write
from shared.vault import Partial

MIB = 1 << 20
MANIFEST = Manifest(
    kind="image",
    id="img1",
    server=ManifestServer(id="srv1", name="web1", uuid="1-2-3"),
    taken_at=datetime(2026, 3, 1, tzinfo=UTC),
    way="stream",
    consistency="crash",
    disks=[ManifestDisk(target="vda", file="disk", format="raw", virtual_bytes=MIB, bytes=MIB)],
)


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """An XFS with reflinks that nobody else uses."""
    if not filesystems.can_mount():
        pytest.skip("mounting a loop device needs root")
    with filesystems.xfs(filesystems.XFS_MINIMUM) as directory:
        yield directory


@pytest.fixture
def disk(room: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of this test's own on it, with a disk in thousands of pieces."""
    folder = room / tmp_path.name
    folder.mkdir()
    path = folder / "disk"
    with path.open("wb") as file:
        for offset in range(0, 8 * MIB, 8192):
            os.pwrite(file.fileno(), b"x" * 4096, offset)
        os.fsync(file.fileno())
    yield path
    shutil.rmtree(folder)


def nobody(*_: object) -> None:
    """Nobody watches."""


def stored(disk: Path) -> list[CopiedDisk]:
    return [CopiedDisk("vda", disk, "raw", disk.stat().st_size, MIB)]


def by_reflink(disk: Path, new: Path) -> Callable[[], object]:
    return lambda: reflink(disk, new)


def by_topping_up(disk: Path, new: Path) -> Callable[[], object]:
    source = os.open(disk, os.O_RDONLY)
    target = create_target(source, new)
    everything = np.array([[0, disk.stat().st_size]], np.uint64)

    def top_up() -> None:
        try:
            clone_ranges(source, target, everything)
        finally:
            os.close(source)
            os.close(target)
            new.unlink()  # whose it is

    return top_up


def by_stream(disk: Path, new: Path) -> Callable[[], object]:
    return lambda: stream_copy(disk, new, "raw", "raw", nobody, bool, free_floor=0)


def by_materialising(disk: Path, new: Path) -> Callable[[], object]:
    return lambda: materialise(stored(disk), {"vda": new})


def by_copying_uefi_variables_in(disk: Path, new: Path) -> Callable[[], object]:
    variables = SmallFile(disk, new / "nvram.fd")
    new.mkdir()

    def warm() -> None:
        try:
            variables.warm()
        finally:
            variables.copy.unlink(missing_ok=True)  # as the engine does
            new.rmdir()

    return warm


def by_copying_uefi_variables_out(disk: Path, new: Path) -> Callable[[], object]:
    return lambda: copy_small(disk, new)


def by_publishing(disk: Path, new: Path) -> Callable[[], object]:
    partial = Partial(new)
    partial.path.mkdir()
    (partial.path / "disk").hardlink_to(disk)

    def publish() -> None:
        with partial:
            # More than fits into what a new file may get without a block of its own.
            partial.publish(MANIFEST, f"<domain>{'x' * MIB}</domain>")

    return publish


@pytest.mark.parametrize(
    "prepare",
    [
        by_reflink,
        by_topping_up,
        by_stream,
        by_materialising,
        by_copying_uefi_variables_in,
        by_copying_uefi_variables_out,
        by_publishing,
    ],
)
def test_a_full_disk_is_said(
    disk: Path, prepare: Callable[[Path, Path], Callable[[], object]]
) -> None:
    """ENOSPC is insufficient_space whatever was written, with nothing of it left."""
    work = prepare(disk, disk.with_name("new"))
    ballast = filesystems.fill(disk.parent, crumbs=4096)
    try:
        with pytest.raises(InsufficientSpace) as refusal:
            work()
    finally:
        ballast.unlink()
    assert refusal.value.code == "insufficient_space"
    assert [path.name for path in disk.parent.iterdir()] == ["disk"]


def test_a_seed_that_finds_no_room_is_said(disk: Path) -> None:
    """Of a clone, whose steps are undone then; the file goes with them."""
    ballast = filesystems.fill(disk.parent, crumbs=4096)
    try:
        with pytest.raises(InsufficientSpace):
            write_seed(disk.with_name("seed.iso"), "instance", "host", "0" * 32)
    finally:
        ballast.unlink()


def test_a_manifest_that_cannot_be_replaced_stays(disk: Path) -> None:
    """The old one is there, whole, and nothing beside it."""
    write(disk.parent, MANIFEST)
    longer = MANIFEST.model_copy(update={"way": "x" * MIB})
    ballast = filesystems.fill(disk.parent, crumbs=4096)
    try:
        with pytest.raises(InsufficientSpace):
            write(disk.parent, longer)
    finally:
        ballast.unlink()
    assert read_manifest(disk.parent).way == "stream"
    assert sorted(path.name for path in disk.parent.iterdir()) == ["disk", "manifest.json"]


@pytest.mark.parametrize("step", ["prepare", "swap"])
def test_no_room_for_a_name(step: str) -> None:
    """Setting aside needs names alone; where there is none for one, the live disk stays."""
    if not filesystems.can_mount():
        pytest.skip("mounting needs root")
    with filesystems.tmpfs(inodes=8) as folder:
        live = {"vda": folder / "vda.raw"}
        live["vda"].write_text("old")
        if step == "swap":
            setaside.prepare(live, "op1")["vda"].write_text("new")
        with pytest.raises(OSError, match="No space left"):
            for number in range(8):
                (folder / str(number)).touch()
        with pytest.raises(InsufficientSpace):
            setaside.prepare(live, "op1") if step == "prepare" else setaside.swap(live, "op1")
        setaside.swap_back(live, "op1")
        assert live["vda"].read_text() == "old"


def test_a_stream_ends_at_the_floor(tmp_path: Path, room: Path) -> None:
    """A copy for which there was room, until somebody else took it, leaves that somebody some."""
    source = tmp_path / "a.raw"
    source.write_bytes(os.urandom(24 * MIB))
    floor = 0.25
    ballast: list[Path] = []

    def take_room(_part: float) -> None:
        if not ballast:
            leave = int(filesystems.size(room) * floor * 0.9)
            ballast.append(filesystems.fill(room, leave=leave))

    with pytest.raises(InsufficientSpace) as refusal, pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.disks.space.LOOK_EVERY_S", 0)
        stream_copy(source, room / "b.raw", "raw", "raw", take_room, bool, free_floor=floor)
    ballast[0].unlink()
    assert 0 < refusal.value.extra["free_bytes"] < refusal.value.extra["kept_free_bytes"]
    assert "are left at" in refusal.value.detail
    assert not (room / "b.raw").exists()
