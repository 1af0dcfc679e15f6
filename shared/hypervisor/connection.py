"""The one libvirt connection of a process, and libvirt's errors in our words.

Owns: the event loop thread, opening, reviving and silencing. libvirt's event
loop must be registered before the first connection is opened, cannot be
changed afterwards and must run all the time (libvirt-event API), so it lives
here and nowhere else. Connections are never carried over a fork: the registry
is keyed by process id.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import libvirt

from shared.hypervisor.errors import (
    DomainMissing,
    HypervisorError,
    LibvirtBusy,
    LibvirtFailed,
    LibvirtUnavailable,
)

log = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3

_lock = threading.Lock()
_loops: set[int] = set()
_connections: dict[tuple[int, str], Any] = {}

# Errors that are about the wire, not about the request.
_GONE = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_LIBSSH,
}
_WIRE = {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}
_GONE_WORDS = ("client socket is closed", "keepalive timeout", "end of file while reading")


def connect(uri: str) -> Any:
    """This process's live connection to `uri` (a `libvirt.virConnect`).

    The same object as long as it is alive; a dead one is replaced. Threads
    share it. Raises LibvirtUnavailable when libvirt does not answer.
    """
    with _lock:
        key = (os.getpid(), uri)
        known = _connections.get(key)
        if known is not None:
            if _alive(known):
                return known
            del _connections[key]
        _run_event_loop()
        try:
            fresh = libvirt.open(uri)
        except libvirt.libvirtError as error:
            raise LibvirtUnavailable(
                f"libvirt at {uri} does not answer: {error}. Nothing was changed; "
                "check that libvirtd runs and that this user may use its socket."
            ) from error
        # The test driver has no wire to keep alive.
        with contextlib.suppress(libvirt.libvirtError):
            fresh.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        _connections[key] = fresh
        return fresh


def forget(uri: str) -> None:
    """Close this process's connection to `uri`, if there is one."""
    with _lock:
        known = _connections.pop((os.getpid(), uri), None)
    if known is not None:
        with contextlib.suppress(libvirt.libvirtError):
            known.close()


def is_gone(error: libvirt.libvirtError) -> bool:
    """Whether `error` says that the connection is dead rather than the request bad."""
    code, space = error.get_error_code(), error.get_error_domain()
    if code in _GONE or (code == libvirt.VIR_ERR_SYSTEM_ERROR and space in _WIRE):
        return True
    message = str(error).lower()
    return code == libvirt.VIR_ERR_INTERNAL_ERROR and any(w in message for w in _GONE_WORDS)


def translate(error: libvirt.libvirtError, doing: str) -> HypervisorError:
    """Our error for a libvirt error met while `doing` (e.g. "Resuming web1")."""
    code = error.get_error_code()
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return DomainMissing(
            f"{doing}: libvirt knows no such domain ({error}). Was it undefined? "
            "Define it again or restore it from an image."
        )
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        # The wait for a domain's job lock is 30 s, hard-coded: somebody else
        # holds it, which says nothing about our request.
        return LibvirtBusy(
            f"{doing}: libvirt is busy with another job of this domain ({error}). "
            "Nothing was changed; try again when that job is done."
        )
    if is_gone(error):
        return LibvirtUnavailable(f"{doing}: the connection to libvirt was lost ({error}).")
    return LibvirtFailed(f"{doing}: {error}", libvirt_code=code)


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn every libvirt error raised inside into one of ours."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, doing) from error


def _alive(connection: Any) -> bool:
    try:
        # isAlive() alone misses a daemon that died a moment ago: the event
        # loop may not have seen the hang-up yet. The version goes over the wire.
        if not connection.isAlive():
            return False
        connection.getLibVersion()
    except libvirt.libvirtError:
        return False
    return True


def _run_event_loop() -> None:
    """Start libvirt's event loop once per process, and silence its stderr printing."""
    pid = os.getpid()
    if pid in _loops:
        return
    libvirt.registerErrorHandler(_ignore, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_turn, name="libvirt-events", daemon=True).start()
    _loops.add(pid)


def _turn() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            log.exception("libvirt's event loop stumbled; going on")


def _ignore(_context: object, _error: object) -> None:
    """libvirt prints every error on stderr unless told otherwise; ours carry them."""
