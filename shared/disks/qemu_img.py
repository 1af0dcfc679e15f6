"""Running a qemu-img that works for long: of a worker that dies nothing is left that goes on."""

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from shared.disks.errors import CopyFailed

Progress = Callable[[float], None]
"""Gets the part that is done, from 0 to 1."""

_TICK_S = 0.2
_COMPLAINT = 4096
"""Bytes of what it complains about that are kept; it may be a line for each cluster."""
_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")


def run(
    arguments: list[str],
    check: Callable[[], None] = lambda: None,
    progress: Progress = lambda _part: None,
) -> tuple[int, str]:
    """Run qemu-img to its end: its exit status, and the end of what it complained about.

    It is killed with the thread that starts it (prctl(2), PR_SET_PDEATHSIG). What `check` raises
    ends it, within a second. Raises CopyFailed where it cannot be started.
    """
    if shutil.which("qemu-img") is None:
        raise CopyFailed("qemu-img is not installed; install qemu-utils.")
    try:
        started = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "qemu-img", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            umask=0o077,
        )
    except OSError as error:
        raise CopyFailed(f"qemu-img could not be started: {error}.") from error
    with started as process:
        try:
            complaint = _follow(process, check, progress)
        except BaseException:
            _kill(process)
            raise
    return process.returncode, complaint


def _follow(
    process: subprocess.Popen[bytes],
    check: Callable[[], None],
    progress: Progress,
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
                complaint = (complaint + data)[-_COMPLAINT:]
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
