"""Runs a daemon and takes over its orphans, so that a guest that has ended is gone at once.

A QEMU that libvirt started is a child of process 1. Where that collects its dead only now and
then (containers, minimal machines), a dead QEMU stays a zombie for up to two seconds, and libvirt
waits for it at every stop of a guest. As a child of this process it is collected right away.

Used as a program, `reaper.py COMMAND…`, with nothing but the standard library. SIGTERM is handed
on to the command, `KILL` kills it. This ends when the command does, with its status; what is
left then is process 1's, and runs on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: What to send so that the command is killed and gone when this process is: a SIGKILL to this
#: process kills the command too, but a moment later.
KILL = signal.SIGUSR1
# prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals = {signal.SIGTERM: signal.SIGTERM, KILL: signal.SIGKILL}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    daemon = os.fork()
    if not daemon:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        os.execvp(command[0], command)  # noqa: S606  no shell is the point
    for received, passed_on in signals.items():
        # Not before the child is known; it cannot be gone and its number another's, for only
        # the loop below collects it, and then ends.
        signal.signal(received, lambda *_, number=passed_on: os.kill(daemon, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    while True:
        pid, status = os.wait()
        if pid == daemon:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
