"""Is the process that owns an operation still alive? The kernel knows.

Each worker process holds a lock on a file in the vault for as long as it lives. SIGKILL
releases it, whatever container the process was in, so a successor on the same host need
not wait for the lease to run out.
"""

import fcntl
import os
from functools import cache
from pathlib import Path
from uuid import uuid4

from shared.settings import settings


def _folder() -> Path:
    folder = settings().vault / ".workers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@cache
def _hold(pid: int, service: str) -> tuple[str, int]:
    owner = f"{settings().host}/{service}/{uuid4().hex}"
    lock = os.open(_folder() / _file_name(owner), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return owner, lock


def _file_name(owner: str) -> str:
    return owner.replace("/", "~")


def owner_name(service: str) -> str:
    """This process's name as an owner; the lock is taken at the first call."""
    return _hold(os.getpid(), service)[0]


def is_dead(owner: str) -> bool:
    """True only for a process of this host that is known to be gone."""
    if owner.split("/")[0] != settings().host:
        return False
    path = _folder() / _file_name(owner)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)
