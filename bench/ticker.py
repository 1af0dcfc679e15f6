"""What a guest's user feels of a copy, by the host's clock: gaps in what a probe inside sends.

A guest that is held sees nothing of it, since its clocks stand still too. So the probe
(`bench/probe.c`) sends a byte over a virtio-serial port for each millisecond that it slept, or
for each write that it made, and a process on the host (`python -m bench.ticker SOCKET FILE`)
stamps what arrives. The guest's port is emulated by the CPU's own thread, so no byte is under way
while the guest is held: the hold shows in full. A gap can be longer than the hold, by what the
host took to schedule QEMU and the reader; what gaps there are without any copy is measured
beside it. A hold shorter than a tick cannot be seen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.disks import PROBE
from lab.guest import Guest

PORT = "bench.ticks"
SETTLE_S = 0.1
"""Until what ends a gap has been written down."""
_MS = 1_000_000


def channel(path: Path) -> str:
    """The device to define a guest with, whose end on the host is the socket `path`."""
    return (
        f"<channel type='unix'><source mode='bind' path='{path}'/>"
        f"<target type='virtio' name='{PORT}'/></channel>"
    )


@dataclass
class Window:
    """Some time on the host's monotonic clock, in nanoseconds."""

    began: int = 0
    ended: int = 0


class Recording:
    """When bytes arrived: gaps between them in milliseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:
        """The time of the block."""
        window = Window(time.monotonic_ns())
        yield window
        window.ended = time.monotonic_ns()
        time.sleep(SETTLE_S)

    def gaps(self, window: Window) -> NDArray[np.float64]:
        """Of the window, those that reach into it included. Raises RuntimeError without any."""
        found = gaps(np.fromfile(self._path, np.uint64), window)
        if not len(found):
            raise RuntimeError("the guest's probe sent nothing")
        return found

    def longest(self, window: Window) -> float:
        return float(self.gaps(window).max())

    def arrived(self) -> int:
        """How many bytes up to now."""
        return self._path.stat().st_size // 8


def gaps(stamps: NDArray[np.uint64], window: Window) -> NDArray[np.float64]:
    """Milliseconds between neighbours, one of which at least, or the time between, is inside."""
    starts, ends = stamps[:-1], stamps[1:]
    inside = (ends > window.began) & (starts < window.ended)
    lengths: NDArray[np.float64] = (ends[inside] - starts[inside]) / _MS
    return lengths


@contextlib.contextmanager
def recording(guest: Guest, end: Path, *probe: str) -> Iterator[Recording]:
    """Have the guest run the probe (`tick`, or `write` and a file), and stamp what it sends to
    `end`, the socket of its channel."""
    file = end.with_name("stamps")
    file.unlink(missing_ok=True)
    verb, *rest = probe
    status, port = guest.run(f"grep -l {PORT} /sys/class/virtio-ports/*/name")
    if status:
        raise RuntimeError(f"the guest has no port {PORT}")
    device = f"/dev/{Path(port.strip()).parent.name}"
    reader = subprocess.Popen([sys.executable, "-m", "bench.ticker", str(end), str(file)])
    try:
        started = guest.agent("guest-exec", path=PROBE, arg=[verb, device, *rest])
        recorded = Recording(file)
        try:
            _wait_for_first(recorded, guest, started["pid"])
            yield recorded
        finally:
            guest.run(f"kill {started['pid']}")
    finally:
        reader.send_signal(signal.SIGTERM)
        reader.wait()


def _wait_for_first(recorded: Recording, guest: Guest, pid: int, patience_s: float = 10) -> None:
    deadline = time.monotonic() + patience_s
    while not recorded._path.exists() or recorded.arrived() < 100:
        if time.monotonic() > deadline:
            told = guest.agent("guest-exec-status", pid=pid)
            raise TimeoutError(f"the guest's probe sends nothing: {told}")
        time.sleep(0.05)


def _stamp(end: str, file: str) -> None:
    """A stamp for each byte; those that came together have one time between them."""
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # it must not wait for what it measures
    with socket.socket(socket.AF_UNIX) as port, Path(file).open("wb", buffering=0) as stamps:
        port.connect(end)
        while data := port.recv(4096):
            stamps.write(struct.pack("=Q", time.monotonic_ns()) * len(data))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _stamp(*sys.argv[1:])
