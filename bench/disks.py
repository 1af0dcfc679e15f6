"""The disks that are measured: a guest's system, then data that no tool can make smaller.

Owns making them, as quickly as the disk allows, and changing them as a day of work would.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.sizes import CHURN_BLOCK, DATA_AT, MIB
from lab.guest import make_disk
from shared.disks.reflink import sync_source

PROBE = "/probe"
"""Where the guest finds the probe, `bench/probe.c`."""
_SOURCE = Path(__file__).with_name("probe.c")
_BLOCK = 4096
_MOUNTED = 64 * MIB
_NOISE = 2048 * MIB
"""Random bytes made once a disk; larger ones hold them several times."""


def system_disk(folder: Path, data: int, size: int) -> Path:
    """A qcow2 of `size` bytes that boots, with `data` bytes of noise behind its file system.

    Its extents are what writing it in order made them: nothing in it is shared.
    """
    with tempfile.TemporaryDirectory(dir=folder) as work:
        raw = make_disk(Path(work), "raw", size=size)
        probe = Path(work) / "probe"
        _run("gcc", "-static", "-O2", "-o", str(probe), str(_SOURCE))
        _run("debugfs", "-w", "-R", f"write {probe} {PROBE}", str(raw))
        _run("debugfs", "-w", "-R", f"set_inode_field {PROBE} mode 0100755", str(raw))
        disk = folder / "system.qcow2"
        _run("qemu-img", "convert", "-O", "qcow2", str(raw), str(disk))
    if data:
        with noise(min(data, _NOISE)) as (source, length):
            for at in range(0, data, length):
                _write_in(disk, source, DATA_AT + at, min(length, data - at))
    sync_source(disk)
    return disk


def raw_of(disk: Path, raw: Path) -> Path:
    """The same disk, of a guest that is off, as a sparse raw file."""
    _run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw))
    sync_source(raw)
    return raw


@contextlib.contextmanager
def noise(length: int) -> Iterator[tuple[Path, int]]:
    """A file of `length` random bytes, in memory where there is a place for that."""
    memory = Path("/dev/shm")  # noqa: S108
    place = memory if memory.is_dir() else None
    dice = np.random.default_rng()
    with tempfile.NamedTemporaryFile(dir=place, prefix="triptych-bench-") as file:
        for _ in range(length // (16 * MIB)):
            file.write(dice.bytes(16 * MIB))
        file.flush()
        os.truncate(file.name, length)
        yield Path(file.name), length


def _write_in(disk: Path, source: Path, at: int, length: int) -> None:
    target = f"driver=raw,offset={at},size={length},file.driver=qcow2,file.file.driver=file"
    target += f",file.file.cache.direct=on,file.file.filename={disk}"
    image = f"driver=raw,size={length},file.driver=file,file.filename={source}"
    _run("qemu-img", "convert", "-n", "--image-opts", "--target-image-opts", image, target)


def scattered_disk(path: Path, pieces: int) -> Path:
    """A raw disk in that many extents and a few more: an ext4, and behind it every second block
    is a hole. The guest mounts the ext4, so that a freeze writes to this disk too."""
    block = os.urandom(_BLOCK)
    make_disk(path.parent, "raw", "data", _MOUNTED, path.name)
    with path.open("r+b") as file:
        for index in range(pieces):
            os.pwrite(file.fileno(), block, _MOUNTED + index * 2 * _BLOCK)
        os.truncate(file.name, _MOUNTED + -(-pieces * 2 * _BLOCK // MIB) * MIB)
    sync_source(path)
    return path


def churn(disk: Path, data: int, part: float, dice: random.Random) -> int:
    """Overwrite that part of the data of a qcow2 that nobody has open, in random blocks of
    64 KiB, no block twice. Returns the bytes.

    Written where QEMU would write them: a cluster that is allocated is overwritten in place.
    """
    places = _clusters(disk, data)
    chosen = dice.sample(places, round(len(places) * part))
    with disk.open("r+b", buffering=0) as file:
        for place in chosen:
            os.pwrite(file.fileno(), os.urandom(CHURN_BLOCK), place)
        os.fsync(file.fileno())
    return len(chosen) * CHURN_BLOCK


@functools.cache
def _clusters(disk: Path, data: int) -> list[int]:
    """Where in the file each 64 KiB of the data is; it stays there."""
    places: list[int] = []
    for piece in json.loads(_run("qemu-img", "map", "--output=json", str(disk))):
        if piece["data"] and DATA_AT <= piece["start"] < DATA_AT + data:
            places += range(piece["offset"], piece["offset"] + piece["length"], CHURN_BLOCK)
    return places


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
