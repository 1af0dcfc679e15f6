"""Is the attempt that owns an operation still going on? The kernel knows.

Each attempt holds a lock on a file in the vault for as long as it lasts. Its end releases the
lock, and so does SIGKILL, whatever container the process was in: a successor on the same host
need not wait for the lease to run out, and never takes a slow worker for a dead one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from uuid import uuid4

from shared import mounted
from shared.settings import settings

UNSEEN = "?"
"""After the host's name in that of an owner without a file."""


def folder() -> Path:
    """Where there is a file for each attempt that goes on on this host."""
    return settings().vault / ".workers"


def _file(owner: str) -> Path:
    return folder() / owner.replace("/", "~")


def _made() -> Path:
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder()


@contextmanager
def attempt(service: str) -> Iterator[str]:
    """The name, as an owner, of what this block does.

    Where the vault is not there, it is one of which nothing is known but its lease.
    """
    if not mounted.is_there():
        yield f"{settings().host}{UNSEEN}/{service}/{uuid4().hex}"
        return
    owner = f"{settings().host}/{service}/{uuid4().hex}"
    _made()
    path = _file(owner)
    lock = _locked(path)
    try:
        yield owner
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _locked(path: Path) -> int:
    """A lock on a file that stands under its name: a sweep may come between the two."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
        os.close(lock)


def dead() -> set[str]:
    """The owners that have died on this host and left their file, which is removed."""
    left = [path.name.replace("~", "/") for path in _made().iterdir()]
    # One that ends in between takes its file with it.
    return {owner for owner in left if _file(owner).exists() and of(owner) == "dead"}


def left(owner: str) -> bool:
    """Whether there is a file of that owner in this host's vault."""
    return _file(owner).exists()


def of(owner: str, *, sweep: bool = True) -> Literal["alive", "dead", "unknown"]:
    """What is known of an owner; `unknown` for those of other hosts, and without the vault.

    The file of a dead one is removed. Without `sweep` it stays: the bystander, who learns of the
    death from that file, may not have seen it yet.
    """
    if owner.split("/")[0] != settings().host or not mounted.seems_there():
        return "unknown"
    path = _file(owner)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return "dead"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "alive"
    else:
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(path.stat(), os.fstat(lock)):
                return "alive"  # somebody else removed this one, and its owner made another
            if sweep:
                path.unlink()
        return "dead"
    finally:
        os.close(lock)
