"""A full, flattened, sparse copy of an image that nobody writes, by qemu-img convert.

Owns: one copying process from start to a synced file or none at all.
"""

import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shared.disks.durable import sync
from shared.disks.errors import CopyFailed, InsufficientSpace
from shared.disks.qemu_img import writing
from shared.disks.space import FLOOR, FloorWatch, full_is_said, says_full
from shared.errors import Cancelled

Progress = Callable[[float], None]

# Measured best for a 20 GiB disk with 2 GiB in it: 2.5 s against 7-16 s plain.
_PARALLEL = ["-W", "-m", "16"]
_ZSTD = ["-c", "-o", "compression_type=zstd"]
_TICK_S = 0.2
_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")


def stream_copy(
    src: Path,
    dst: Path,
    src_format: str,
    dst_format: str,
    progress: Progress,
    cancelled: Callable[[], bool],
    *,
    free_floor: float = FLOOR,
    compress: bool = False,
    unlocked: bool = False,
) -> None:
    """Copy `src` with its whole chain into `dst`, a new file of mode 0600; synced.

    `progress` gets the part that is done, from 0 to 1. `src` may be a block device. `compress` a
    qcow2 `dst` with zstd (QEMU 5.1 or newer reads it). `unlocked` lets QEMU write to `src`
    meanwhile: to notice that is the caller's. Raises
    FileExistsError, Cancelled (within a second of `cancelled()` turning true), what `cancelled`
    raises, InsufficientSpace (also as soon as less than `free_floor` of the file system is
    left) or CopyFailed; nothing of `dst` is left then.
    """
    if dst.exists():
        raise FileExistsError(dst)
    room = FloorWatch(dst.parent, free_floor)

    def check() -> None:
        if cancelled():
            raise Cancelled("The copy was cancelled. Nothing of it was kept.")
        room.check()

    try:
        options = [*(_ZSTD if compress else []), *(["-U"] if unlocked else [])]
        _convert(src, dst, (src_format, dst_format), options, progress, check)
        with full_is_said(dst.parent):
            dst.chmod(0o600)
            sync(dst)
    except BaseException:
        dst.unlink(missing_ok=True)
        raise


def _convert(
    src: Path,
    dst: Path,
    formats: tuple[str, str],
    options: list[str],
    progress: Progress,
    check: Callable[[], None],
) -> None:
    """Run qemu-img; what `check` raises ends it."""
    cache = ["-t", "none", "-T", "none"] if _direct(src) and _direct(dst.parent) else []
    command = writing("convert", "-p", *_PARALLEL, *cache, *options)
    command += ["-f", formats[0], "-O", formats[1], str(src), str(dst)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        umask=0o077,
    ) as process:
        try:
            complaint = _follow(process, progress, check)
        except BaseException:
            _kill(process)
            raise
    if process.returncode:
        if says_full(complaint):
            raise InsufficientSpace(
                f"The file system of {dst.parent} became full; nothing of the copy was kept."
            )
        raise CopyFailed(
            f"{src.name} could not be copied: {complaint or 'qemu-img gave no reason'}. "
            "The source was not touched and nothing of the copy was kept."
        )


def _follow(
    process: subprocess.Popen[bytes],
    progress: Progress,
    check: Callable[[], None],
) -> str:
    """Read qemu-img's progress until it ends; returns what it complained about."""
    assert process.stdout and process.stderr  # noqa: S101 - both are pipes
    out, err = process.stdout.fileno(), process.stderr.fileno()
    open_ends, complaint, tail = {out, err}, b"", b""
    while open_ends:
        check()
        ready, _, _ = select.select(list(open_ends), [], [], _TICK_S)
        for end in ready:
            data = os.read(end, 65536)
            if not data:
                open_ends.discard(end)
            elif end == err:
                complaint = (complaint + data)[-4096:]
            else:
                tail = (tail + data)[-64:]
                found = _PERCENT.findall(tail)
                if found:
                    progress(float(found[-1]) / 100)
    process.wait()
    return complaint.decode(errors="replace").strip()


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 0.3
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _direct(path: Path) -> bool:
    """Whether `path`, or a new file in that directory, can be opened past the page cache."""
    try:
        if path.is_dir():
            with tempfile.TemporaryFile(dir=path) as probe:  # no name to leave behind
                own = f"/proc/self/fd/{probe.fileno()}"
                os.close(os.open(own, os.O_RDWR | os.O_DIRECT))
        else:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
