"""Full copies by qemu-img, and the room they need."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from operations.waiting import wait_for

from lab.filesystems import size
from lab.processes import children_of, is_gone
from lab.qemu_img import slowed
from shared.disks import images
from shared.disks.copy import stream_copy
from shared.disks.errors import CopyFailed, ImageDamaged, InsufficientSpace
from shared.disks.space import ensure_space, ensure_space_for, free_bytes
from shared.errors import Cancelled

MIB = 1 << 20


def quiet(_part: float) -> None:
    """Nobody watches."""


def never() -> bool:
    return False


def qemu_img(*arguments: object) -> str:
    command = ["qemu-img", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def raw(path: Path, data_mib: int = 4, size_mib: int = 32) -> Path:
    """A sparse raw disk with random data at its start."""
    with path.open("wb") as file:
        file.write(os.urandom(data_mib * MIB))
        file.truncate(size_mib * MIB)
    return path


def test_raw_to_qcow2_and_back_is_the_same_disk(tmp_path: Path) -> None:
    """Two conversions later every byte is where it was; copies are private and sparse."""
    source = raw(tmp_path / "a.raw")
    stream_copy(source, tmp_path / "b.qcow2", "raw", "qcow2", quiet, never)
    stream_copy(tmp_path / "b.qcow2", tmp_path / "c.raw", "qcow2", "raw", quiet, never)
    assert (tmp_path / "c.raw").read_bytes() == source.read_bytes()
    assert (tmp_path / "b.qcow2").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "c.raw").stat().st_blocks * 512 < 8 * MIB


def test_a_chain_is_flattened(tmp_path: Path) -> None:
    """The copy of an overlay stands on its own."""
    base = raw(tmp_path / "base.raw")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "top.qcow2")
    assert images.info(tmp_path / "top.qcow2", "qcow2").depends_on
    top, flat = tmp_path / "top.qcow2", tmp_path / "flat.qcow2"
    stream_copy(top, flat, "qcow2", "qcow2", quiet, never)
    base_bytes = base.read_bytes()
    base.unlink()
    assert images.info(tmp_path / "flat.qcow2", "qcow2").depends_on is None
    stream_copy(tmp_path / "flat.qcow2", tmp_path / "flat.raw", "qcow2", "raw", quiet, never)
    assert (tmp_path / "flat.raw").read_bytes() == base_bytes


def test_a_raw_disk_is_never_probed(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk gets that header copied, no more."""
    secret = raw(tmp_path / "secret.raw")
    disk = tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", disk)
    header = disk.read_bytes()
    stream_copy(disk, tmp_path / "copy.raw", "raw", "raw", quiet, never)
    assert images.info(disk, "raw").depends_on is None
    assert (tmp_path / "copy.raw").read_bytes()[: len(header)] == header


def test_progress_is_told_in_parts(tmp_path: Path) -> None:
    """Progress grows to the whole."""
    told: list[float] = []
    source = raw(tmp_path / "a.raw", 16)
    stream_copy(source, tmp_path / "b", "raw", "qcow2", told.append, never)
    assert told[-1] == 1.0
    assert told == sorted(told)


def test_cancel_ends_it_within_a_second_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled copy's process is gone, and so is its file."""
    slow = tmp_path / "bin" / "qemu-img"
    slow.parent.mkdir()
    slow.write_text(
        '#!/bin/sh\n[ "$1" = convert ] || exec /usr/bin/qemu-img "$@"\n'
        'for last; do :; done; trap "" TERM; echo half > "$last"; sleep 60 & wait; wait\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    source, target = raw(tmp_path / "a.raw"), tmp_path / "b"
    took: list[float] = []
    while len(took) < 3 and min(took, default=1.4) >= 1.4:
        asked: list[float] = []

        def once_begun(asked: list[float] = asked) -> bool:
            if target.exists() and not asked:
                asked.append(time.monotonic())
            return bool(asked)

        with pytest.raises(Cancelled):
            stream_copy(source, target, "raw", "raw", quiet, once_begun)
        took.append(time.monotonic() - asked[0])
        assert not target.exists()
    assert min(took) < 1.4


@pytest.fixture
def copying(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of its own that is inside `stream_copy`, which will take it minutes."""
    script = """
from pathlib import Path
from shared.disks.copy import stream_copy
stream_copy(Path("a.raw"), Path("b.raw"), "raw", "raw", lambda _part: None, lambda: False)
"""
    raw(tmp_path / "a.raw", 16)
    (tmp_path / "bin").mkdir()
    environment = {"PATH": slowed(tmp_path / "bin"), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as worker:
        yield worker
        worker.kill()


def test_a_killed_worker_takes_its_qemu_img_along(
    tmp_path: Path, copying: subprocess.Popen[bytes]
) -> None:
    """What undoes the copy, or makes it anew, has the file for itself."""
    wait_for(lambda: (tmp_path / "b.raw").exists())
    (qemu_img,) = children_of(copying.pid)
    try:
        copying.kill()
        wait_for(lambda: is_gone(qemu_img), seconds=20)
    finally:
        if not is_gone(qemu_img):
            os.kill(qemu_img, signal.SIGKILL)


def test_a_missing_qemu_img_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be installed is said, and nothing is left."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "setpriv").symlink_to("/usr/bin/setpriv")
    source = raw(tmp_path / "a.raw")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(CopyFailed, match="install qemu-utils"):
        stream_copy(source, tmp_path / "b", "raw", "raw", quiet, never)
    assert not (tmp_path / "b").exists()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, ext4: Path) -> None:
    """Running out of space is told as such; no partial file is left."""
    source = raw(tmp_path / "a.raw", 80, 96)
    with pytest.raises(InsufficientSpace):
        stream_copy(source, ext4 / "b.raw", "raw", "raw", quiet, never)
    assert not (ext4 / "b.raw").exists()


def test_tmpfs_is_served_without_direct_io(tmp_path: Path) -> None:
    """Where O_DIRECT is refused the copy goes through the page cache."""
    shm = Path(f"/dev/shm/triptych-test-{os.urandom(4).hex()}.raw")  # noqa: S108
    source = raw(tmp_path / "a.raw")
    try:
        stream_copy(source, shm, "raw", "raw", quiet, never)
        assert shm.read_bytes() == source.read_bytes()
    finally:
        shm.unlink(missing_ok=True)


def test_an_existing_target_is_never_overwritten(tmp_path: Path) -> None:
    """A file that is there already is an error and keeps its contents."""
    (tmp_path / "b").write_text("precious")
    with pytest.raises(FileExistsError):
        stream_copy(raw(tmp_path / "a"), tmp_path / "b", "raw", "raw", quiet, never)
    assert (tmp_path / "b").read_text() == "precious"


def test_a_damaged_source_fails_and_leaves_nothing(tmp_path: Path) -> None:
    """What is no qcow2 is not copied as one."""
    with pytest.raises(CopyFailed):
        stream_copy(raw(tmp_path / "a"), tmp_path / "b", "qcow2", "qcow2", quiet, never)
    assert not (tmp_path / "b").exists()


def test_check_finds_damage(tmp_path: Path) -> None:
    """An image whose refcount table is gone does not pass; an intact and a raw one do."""
    stream_copy(raw(tmp_path / "a"), tmp_path / "b", "raw", "qcow2", quiet, never)
    images.check(tmp_path / "b", "qcow2")
    images.check(tmp_path / "a", "raw")
    with (tmp_path / "b").open("r+b") as file:
        file.seek(65536)
        file.write(b"\0" * 65536)
    with pytest.raises(ImageDamaged):
        images.check(tmp_path / "b", "qcow2")


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 127"])
def test_a_check_that_came_to_no_end_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Killed for its memory, say: of the image that tells nothing."""
    image, script = tmp_path / "image.qcow2", tmp_path / "qemu-img"
    qemu_img("create", "-q", "-f", "qcow2", image, "32M")
    script.write_text(f"#!/bin/sh\n{end}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CopyFailed, match="killed"):
        images.check_by_qemu(image, "qcow2")


@pytest.mark.parametrize("look", [images.check_by_qemu, images.count_anew])
def test_a_cancel_ends_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[..., None]
) -> None:
    """Of terabytes it takes minutes. It is not waited for, and goes."""
    image, script = tmp_path / "image.qcow2", tmp_path / "qemu-img"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "32M")
    with image.open("r+b") as file:
        file.seek(79)  # the last byte of the features that a reader must know: it is dirty
        file.write(b"\1")
    script.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def cancel() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise Cancelled("that will do")

    began = time.monotonic()
    with pytest.raises(Cancelled, match="that will do"):
        look(image, "qcow2", cancel)
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_dirty_image_is_counted_anew(tmp_path: Path) -> None:
    """What QEMU had open with lazy refcounts passes afterwards, the same disk. What is not dirty
    is not repaired: its damage is found."""
    dirty, plain = tmp_path / "dirty.qcow2", tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", dirty, "32M")
    killed = ["qemu-io", "-c", "write -P 7 0 4M", "-c", "flush", "-c", "sigraise 9", str(dirty)]
    assert subprocess.run(killed, capture_output=True).returncode
    with pytest.raises(ImageDamaged):
        images.check(dirty, "qcow2")
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", dirty, plain)
    images.count_anew(dirty, "qcow2")
    images.check(dirty, "qcow2")
    qemu_img("compare", dirty, plain)

    with plain.open("r+b") as file:
        file.seek(65536)
        file.write(b"\0" * 65536)
    damaged = plain.read_bytes()
    images.count_anew(plain, "qcow2")
    assert plain.read_bytes() == damaged


def test_measure_is_enough(tmp_path: Path) -> None:
    """A copy takes no more than was measured."""
    source = raw(tmp_path / "a", 7)
    need = images.measure(source, "raw", "qcow2")
    stream_copy(source, tmp_path / "b", "raw", "qcow2", quiet, never)
    assert (tmp_path / "b").stat().st_blocks * 512 <= need < 8 * MIB


def test_space_is_refused_with_numbers(tmp_path: Path) -> None:
    """Too little room is a refusal that carries what was needed and what there is."""
    more_than_there_is = size(tmp_path) + MIB  # whoever gives room back meanwhile
    ensure_space(tmp_path, 0, floor=0)
    with pytest.raises(InsufficientSpace) as refusal:
        ensure_space(tmp_path, more_than_there_is, floor=0)
    assert refusal.value.status == 507
    assert refusal.value.extra["needed_bytes"] == more_than_there_is


def test_the_floor_is_kept(tmp_path: Path) -> None:
    """What would fit but leave less than the floor is refused."""
    with pytest.raises(InsufficientSpace):
        ensure_space(tmp_path, free_bytes(tmp_path) - 10 * MIB)


def test_needs_on_one_file_system_add_up(tmp_path: Path) -> None:
    """Two disks that fit singly and not together are refused."""
    half = free_bytes(tmp_path) * 6 // 10
    ensure_space_for([(tmp_path, half)], floor=0)
    with pytest.raises(InsufficientSpace):
        ensure_space_for([(tmp_path, half), (tmp_path, half)], floor=0)
