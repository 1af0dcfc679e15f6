"""Owns one thing: `/dev/kvm` being usable by the user QEMU runs as, while a lab needs that.

The guests are emulated (TCG) and never use KVM. But libvirt drops its cache of what QEMU can
do whenever `/dev/kvm` is there and that user cannot open it, and then probes QEMU again at
*every* domain start: 4.6 s instead of 0.4 s.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

DEVICE = Path("/dev/kvm")
# Several labs may run at once (two test runs, say): the first opens the device, the last one
# puts its mode back. One file for each that needs it open (a process may have several labs),
# named PID.TOKEN, and the mode as it was found.
REGISTRY = Path("/run/triptych-lab-kvm")


def accessible(user: str) -> bool:
    """Tell whether `user` may open the device for reading and writing."""
    info = DEVICE.stat()
    account = pwd.getpwnam(user)
    if account.pw_uid == 0:
        return True
    if account.pw_uid == info.st_uid:
        return info.st_mode & 0o600 == 0o600
    if info.st_gid in os.getgrouplist(user, account.pw_gid):
        return info.st_mode & 0o060 == 0o060
    return info.st_mode & 0o006 == 0o006


@contextlib.contextmanager
def opened_for(user: str) -> Iterator[None]:
    """Hold the device open for `user`; a machine without it, or where we may not, is as well."""
    if not DEVICE.exists() or (accessible(user) and not REGISTRY.exists()) or os.geteuid() != 0:
        yield
        return
    claim = REGISTRY / f"{os.getpid()}.{secrets.token_hex(4)}"
    with _registry_locked():
        _drop_dead_claims()
        mode_file = REGISTRY / "mode"
        if not mode_file.exists():
            mode_file.write_text(f"{stat.S_IMODE(DEVICE.stat().st_mode):o}")
        with contextlib.suppress(OSError):
            DEVICE.chmod(0o666)
        claim.touch()
    try:
        yield
    finally:
        with _registry_locked():
            claim.unlink(missing_ok=True)
            _drop_dead_claims()
            if not _claims():
                with contextlib.suppress(OSError):
                    DEVICE.chmod(int(mode_file.read_text(), 8))
                mode_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if not list(REGISTRY.glob("[0-9m]*")):
                (REGISTRY / ".lock").unlink(missing_ok=True)
                REGISTRY.rmdir()


@contextlib.contextmanager
def _registry_locked() -> Iterator[None]:
    with contextlib.ExitStack() as opened:
        path = REGISTRY / ".lock"
        while True:
            REGISTRY.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # who was the last has removed it since
                lock = opened.enter_context(path.open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                    break
        yield


def _claims() -> list[Path]:
    return list(REGISTRY.glob("[0-9]*"))


def _drop_dead_claims() -> None:
    for claim in _claims():
        if not Path(f"/proc/{claim.stem}").exists():
            claim.unlink(missing_ok=True)
