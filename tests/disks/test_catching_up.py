"""Disks that are shared while somebody writes to them, and the maps that tell what changed."""

import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from operations.waiting import wait_for

from shared.disks import extents as maps
from shared.disks.catching_up import MOST_ROUNDS, CatchingUp, catch_up, finish, follow
from shared.disks.errors import PauseTooLong
from shared.disks.extents import difference, extent_count, extents
from shared.disks.reflink import create_target, sync_source

BLOCK = 4096
BUDGET_MS = 5_000
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x1, 0x2, 0x10
_libc = ctypes.CDLL(None, use_errno=True)


def allocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python has only in its plain form."""
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(length))
    assert _libc.fallocate(descriptor, mode, *arguments) == 0, os.strerror(ctypes.get_errno())


def scattered(path: Path, pieces: int) -> Path:
    """A file with that many extents: every second block is a hole."""
    with path.open("wb") as file:
        for index in range(pieces):
            file.seek(index * 2 * BLOCK)
            file.write(os.urandom(BLOCK))
    sync_source(path)
    return path


def touch_at_random(descriptor: int, dice: random.Random) -> None:
    """One of what guests do to their disks: write, punch, zero, allocate, grow, shrink."""
    size = os.fstat(descriptor).st_size
    offset = dice.randrange(max(size // BLOCK, 1)) * BLOCK
    length = dice.randint(1, 40) * BLOCK
    match dice.randrange(8):
        case 0:
            allocate(descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length)
        case 1:
            allocate(descriptor, ZERO_RANGE | KEEP_SIZE, offset, length)
        case 2:
            allocate(descriptor, KEEP_SIZE, offset, length)
        case 3:
            os.ftruncate(descriptor, max(0, size + dice.randint(-60_000, 60_000)))
        case _:
            start = max(0, offset + dice.randint(-5, 5))
            os.pwrite(descriptor, dice.randbytes(dice.choice([100, BLOCK, length])), start)


@contextmanager
def both(source: Path) -> Iterator[CatchingUp]:
    read = os.open(source, os.O_RDONLY)
    target = create_target(read, source.with_suffix(".copy"))
    try:
        yield CatchingUp(read, target)
    finally:
        os.close(read)
        os.close(target)


def assert_equal(source: Path) -> None:
    assert source.read_bytes() == source.with_suffix(".copy").read_bytes()


@pytest.fixture(params=["xfs", "btrfs"])
def place(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    place = directory / request.node.name.replace("/", "_")
    place.mkdir()
    return place


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_in_between_the_copy_is_equal(place: Path, seed: int) -> None:
    """Writes, holes, zeros, growth and shrinking, before and after any round."""
    dice = random.Random(seed)
    source = scattered(place / "disk", 200)
    with both(source) as copy, source.open("r+b", buffering=0) as guest:
        copy.begin(lambda: None)
        for _ in range(dice.randint(0, 4)):
            for _ in range(dice.randint(0, 12)):
                touch_at_random(guest.fileno(), dice)
            copy.round()
        for _ in range(dice.randint(0, 12)):
            touch_at_random(guest.fileno(), dice)
        copy.finish()
    assert_equal(source)


def test_a_writer_at_work_is_caught_up_with(place: Path) -> None:
    """While another thread writes past the page cache, as QEMU does, before each round; equal
    once it rests."""
    source = scattered(place / "disk", 2000)
    enough = threading.Event()
    writes = 0

    def write() -> None:
        nonlocal writes
        dice = random.Random(1)
        page = mmap.mmap(-1, BLOCK)
        guest = os.open(source, os.O_RDWR | os.O_DIRECT)
        while not enough.is_set():
            page[:8] = dice.randbytes(8)
            os.pwrite(guest, page, dice.randrange(4000) * BLOCK)
            writes += 1
        os.close(guest)

    def more_writes() -> None:
        seen = writes
        wait_for(lambda: writes > seen + 5)

    writer = threading.Thread(target=write)
    writer.start()
    with both(source) as copy:
        catch_up([copy], BUDGET_MS, more_writes)
        enough.set()
        writer.join()
        copy.finish()
    assert writes > 10
    assert_equal(source)


def test_rounds_end_with_a_writer_that_never_rests(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that do not get fewer are left to the pause, or to whoever decides against it."""
    source = scattered(place / "disk", 100)
    rounds: list[int] = []
    monkeypatch.setattr(CatchingUp, "round", lambda self: rounds.append(1) or 1000)
    with both(source) as copy:
        catch_up([copy], BUDGET_MS, lambda: None)
    assert 2 <= len(rounds) <= MOST_ROUNDS


def test_a_budget_that_cannot_be_kept_is_refused_before_it_is_spent(
    xfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too much to find while the guest is held: refused, whenever that is seen."""
    monkeypatch.setattr("shared.disks.catching_up.TICK_NS", 10**12)  # each write is too late a one
    source = scattered(xfs / "refused", 2000)
    with both(source) as copy, source.open("r+b", buffering=0) as guest:
        with pytest.raises(PauseTooLong, match="more than the 0 ms"):
            catch_up([copy], 0.0001, lambda: os.pwrite(guest.fileno(), b"!", 0) and None)
        os.pwrite(guest.fileno(), b"?", 0)
        with pytest.raises(PauseTooLong):
            finish([copy], 0.0001)
        finish([copy], BUDGET_MS)
    assert_equal(source)


def test_a_disk_that_nobody_wrote_needs_no_look(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fragmented it is, an idle guest's disk costs the pause nothing."""
    source = scattered(xfs / "idle", 1000)
    time.sleep(0.1)
    with both(source) as copy:
        catch_up([copy], 0.0001, lambda: None)
        monkeypatch.setattr("shared.disks.catching_up.extents", pytest.fail)
        finish([copy], 0.0001)
    assert_equal(source)


def test_what_was_written_a_moment_ago_is_not_left_for_the_pause(
    xfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freeze makes the guest write: once that is past, there is nothing to look for."""
    monkeypatch.setattr("shared.disks.catching_up.NEGLIGIBLE_MS", 0)  # on a fast machine it may be
    source = scattered(xfs / "frozen", 4000)
    with both(source) as copy, source.open("r+b", buffering=0) as guest:
        catch_up([copy], BUDGET_MS, lambda: None)
        os.pwrite(guest.fileno(), b"as a freeze does", 0)
        follow([copy], BUDGET_MS)
        monkeypatch.setattr("shared.disks.catching_up.extents", pytest.fail)
        finish([copy], BUDGET_MS)
    assert_equal(source)


def test_a_write_just_before_or_after_the_last_look_is_seen(xfs: Path) -> None:
    """Files are stamped by a clock that stands still for milliseconds: a second write within
    its tick leaves the same stamp."""
    source = scattered(xfs / "stamped", 500)
    with both(source) as copy, source.open("r+b", buffering=0) as guest:
        catch_up([copy], BUDGET_MS, lambda: None)
        for index in range(300):
            os.pwrite(guest.fileno(), b"before", index * 2 * BLOCK)
            copy.round()
            os.pwrite(guest.fileno(), b"after!", index * 2 * BLOCK)
            copy.finish()
            assert os.pread(copy.target, 6, index * 2 * BLOCK) == b"after!"
    assert_equal(source)


def test_what_is_left_for_the_pause_is_small(xfs: Path) -> None:
    """A disk in thousands of pieces, a few of them written: those alone are shared again."""
    source = scattered(xfs / "left-for-the-pause", 5000)
    with both(source) as copy, source.open("r+b", buffering=0) as guest:
        catch_up([copy], BUDGET_MS, lambda: None)
        for index in range(10):
            os.pwrite(guest.fileno(), b"new", index * 100 * BLOCK)
        os.fsync(guest.fileno())
        changed = copy.round()
        copy.finish()
    assert 10 <= changed <= 20
    assert_equal(source)


def test_maps_tell_pieces_and_leave_out_what_was_never_written(xfs: Path) -> None:
    """Holes and allocated but unwritten blocks both read as zeros: neither is an extent."""
    path = scattered(xfs / "mapped", 20)
    with path.open("r+b", buffering=0) as file:
        allocate(file.fileno(), KEEP_SIZE, 100 * BLOCK, 50 * BLOCK)
        found = extents(file.fileno())
    assert list(found.logical) == [index * 2 * BLOCK for index in range(20)]
    assert set(found.length) == {BLOCK}
    assert found.placed.all()


def test_maps_larger_than_one_request(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that takes many calls is the same as one that takes one."""
    path = scattered(xfs / "many-requests", 300)
    with path.open("rb") as file:
        whole = extents(file.fileno())
        monkeypatch.setattr(maps, "_ROOM", 7)
        parts = extents(file.fileno())
    assert len(whole) == 300
    for name in ("logical", "physical", "length"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_difference_of_equal_and_of_empty_maps(xfs: Path) -> None:
    """A file does not differ from itself; from an empty one it does wherever it is written."""
    path = scattered(xfs / "compared", 3)
    (xfs / "nothing").touch()
    with path.open("rb") as file, (xfs / "nothing").open("rb") as empty:
        some, none = extents(file.fileno()), extents(empty.fileno())
    assert difference(some, some).tolist() == []
    assert difference(none, none).tolist() == []
    written = [[index * 2 * BLOCK, (index * 2 + 1) * BLOCK] for index in range(3)]
    assert difference(some, none).tolist() == written
    assert difference(none, some).tolist() == written


def test_extents_are_counted(xfs: Path) -> None:
    """The count follows a file's fragments (XFS may split off what it preallocated)."""
    assert 20 <= extent_count(scattered(xfs / "counted", 20)) <= 40
