"""Is the attempt that owns an operation still going on? The kernel knows.

Each attempt holds a lock on a file in the vault for as long as it lasts. Its end releases the
lock, and so does SIGKILL, whatever container the process was in: a successor on the same host
need not wait for the lease to run out, and never takes a slow worker for a dead one.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from uuid import uuid4

import structlog

from shared import mounted
from shared.errors import VaultNotMounted
from shared.settings import settings

log = structlog.get_logger()

UNSEEN = "?"
"""Instead of the vault's id, in the name of an owner without a file there."""


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
    """The name, as an owner, of what this block does, with the vault where its file is.

    Where there can be none, without the vault or on one that is read-only or full, it is one of
    which nothing is known but its lease; others give it five of them (`claim.STALLED`).
    """
    name = f"{settings().host}/{service}/{uuid4().hex}"
    lock = None
    try:
        mounted.ensure()
        _made()
        owner = f"{name}@{mounted.known()}"
        path = _file(owner)
        lock = _locked(path)
        mounted.ensure()  # else it is below a mount that went in between
    except (VaultNotMounted, OSError) as error:
        log.warning("attempt.unseen", reason=str(error))
        if lock is not None:
            os.close(lock)
        yield f"{name}@{UNSEEN}"
        return
    try:
        yield owner
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
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
    """What is known of an owner; `unknown` for those of other hosts, and without their vault.

    The file of a dead one is removed. Without `sweep` it stays: the bystander, who learns of the
    death from that file, may not have seen it yet.
    """
    vault = owner.partition("@")[2]  # an earlier version did not tell
    if not is_ours(owner) or not mounted.seems_there() or vault not in ("", mounted.known()):
        return "unknown"
    path = _file(owner)
    try:
        lock = _opened(path)
    except FileNotFoundError:
        return "dead" if mounted.seems_there() else "unknown"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "alive"
    else:
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(path.stat(), os.fstat(lock)):
                return "alive"  # somebody else removed this one, and its owner made another
        if sweep:
            with contextlib.suppress(OSError):
                path.unlink()
        return "dead"
    finally:
        os.close(lock)


def is_ours(owner: str) -> bool:
    """Whether it is, or was, at work on this host."""
    return owner.partition("/")[0] == settings().host


def _opened(path: Path) -> int:
    """To be locked, also on a file system that has become read-only."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
