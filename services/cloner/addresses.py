"""Network addresses for clones: such as no domain of the host has, and none that is being made.

libvirt takes a second domain with the addresses of another without a word. The domains are read
once for an operation. What it draws stands in a file of its own in the vault until its clones are
defined, and so can be read: workers of this host are several processes.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shared.copying import vault
from shared.disks.space import full_is_said
from shared.hypervisor import inventory
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import macs_of
from shared.hypervisor.duplicate import random_mac
from shared.models import Clone
from shared.operations.context import Context
from shared.settings import settings

FOLDER = ".addresses"
"""In the vault."""
_LOCK = ".lock"


@contextmanager
def reserved(
    context: Context, clones: Iterable[Clone], *definitions: str
) -> Iterator[dict[str, Mapping[str, str]]]:
    """For each clone, by its id, addresses by those in the source's `definitions`; nobody else
    draws them in the block. Raises InsufficientSpace and what libvirt raises."""
    folder = vault().root / FOLDER
    own = folder / context.id
    with full_is_said(vault().root):
        folder.mkdir(mode=0o700, exist_ok=True)
    context.undo("remove_file", path=str(own))
    had = sorted({mac for each in definitions for mac in macs_of(each)})
    with _alone(folder):
        # In this order: what goes from a file meanwhile is a domain by then.
        others = [each for each in folder.iterdir() if each.name not in (_LOCK, own.name)]
        taken = {mac for each in others for mac in _read(each)}
        taken |= inventory.addresses(connect(settings().libvirt_uri)) | {mac.lower() for mac in had}
        drawn: dict[str, Mapping[str, str]] = {}
        fresh: list[str] = []
        for clone in clones:
            drawn[clone.id] = {mac: _draw(taken) for mac in had}
            fresh += drawn[clone.id].values()
        with full_is_said(folder):
            own.write_text("\n".join(fresh))
    try:
        yield drawn
    finally:
        own.unlink(missing_ok=True)


def _draw(taken: set[str]) -> str:
    while (mac := random_mac(settings().mac_prefix)) in taken:
        pass
    taken.add(mac)
    return mac


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
