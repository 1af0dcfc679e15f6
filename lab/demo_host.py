"""The hypervisor container's only program: libvirtd, and a VM to try Triptych on.

    python3 -m lab.demo_host [--bare]

The VM and what libvirt needs to start it lie below /srv/triptych-demo, which the container shares
with the demo's three workers. `--bare` makes no VM. SIGTERM powers guests off, as their owner
would, and ends it. Process 1 must be one that waits for orphans (`init: true`, `--init`):
libvirt takes a QEMU that nobody waits for as one that will not die.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
from pathlib import Path

import libvirt

from lab.guest import Guest
from lab.libvirtd import Hypervisor, libvirtd

NAME = "demo"
DATA = Path("/srv/triptych-demo")
SHUTDOWN_S = 8


def main() -> int:
    parser = argparse.ArgumentParser(prog="lab.demo_host", description=__doc__)
    parser.add_argument("--bare", action="store_true", help="libvirtd alone, without a VM")
    bare = parser.parse_args().bare
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with libvirtd(None if bare else DATA / "libvirt") as hypervisor:
        if not bare:
            start_vm(hypervisor)
        print("ready", flush=True)
        stop.wait()
        power_off(hypervisor)
    return 0


def start_vm(hypervisor: Hypervisor) -> None:
    """Start the demo VM, made anew if libvirt does not know it."""
    guest = Guest(hypervisor, NAME)
    if guest.state() == "missing":
        guest = Guest.create(hypervisor, DATA / "vms", NAME, disks=["qcow2"], nic=True)
    if guest.state() == "stopped":
        guest.start(wait=False)


def power_off(hypervisor: Hypervisor) -> None:
    """Ask every guest to shut down, and cut the power of those that do not in time."""
    with hypervisor.connection() as connection:
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            with contextlib.suppress(libvirt.libvirtError):
                domain.shutdown()
        deadline = time.monotonic() + SHUTDOWN_S
        while connection.numOfDomains() and time.monotonic() < deadline:
            time.sleep(0.1)
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()


if __name__ == "__main__":
    sys.exit(main())
