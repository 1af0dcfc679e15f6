"""Letting everybody else go first: a process's CPU and disk at the lowest priority there is."""

import contextlib
import ctypes
import os
import platform

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
"""The numbers of the system call, which the C library has no function for (ioprio_set(2))."""
_THIS_PROCESS, _IDLE = 1, 3 << 13


def give_way() -> None:
    """Have this process run, and use disks, only when nobody else wants to; inherited by threads
    that it starts later. What the machine does not know is left out: not all I/O schedulers of
    Linux look at priorities (BFQ does, and mq-deadline since 5.14; `none` does not)."""
    with contextlib.suppress(OSError):
        os.nice(19)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _THIS_PROCESS, 0, _IDLE)
