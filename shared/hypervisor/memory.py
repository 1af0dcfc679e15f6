"""A guest's RAM in a file, and the guest held at that very instant until its disks are copied.

Owns: saving the memory of a running guest, and starting a domain from what was saved. libvirt's
snapshot with `manual` disks does the first: the guest runs while most of its memory is written,
is paused for the rest, and left paused for us to copy the disks (libvirt, "Snapshot XML",
since 8.2.0).
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import libvirt
from lxml import etree

from shared import faults
from shared.errors import Cancelled
from shared.hypervisor.backup import settle
from shared.hypervisor.connection import connect, translated
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import (
    HypervisorError,
    LibvirtFailed,
    MemoryNotSaved,
    MemoryNotUsable,
    PauseFailed,
    ServerNotRunning,
)
from shared.hypervisor.pause import Pause, give_back
from shared.hypervisor.watchdog import GIVE_UP_S, Watchdog

LIVE_PATIENCE_S = 60.0
"""For so long the guest runs on while it writes its memory faster than that can be saved."""
_POLL_S = 0.1
_MEANWHILE_S = 1.0
_ABORT_PATIENCE_S = 60.0


@contextlib.contextmanager
def memory_saved(
    domain: Domain,
    watchdog: Watchdog,
    target: Path,
    disks: Iterable[str],
    *,
    meanwhile: Callable[[], None] = lambda: None,
    cancelled: Callable[[], bool] = lambda: False,
    live_patience_s: float = LIVE_PATIENCE_S,
) -> Iterator[Pause]:
    """The guest is still inside, at the instant of the memory in `target`; it runs on after it.

    `disks` are the targets that are copied inside. `meanwhile` is called about once a second
    while the memory is being written. `Pause.ms` is what the guest felt: from the moment libvirt
    told of the pause until resume had returned. A guest that its owner had paused stays paused.

    Raises ServerNotRunning, MemoryNotSaved, Cancelled, WatchdogUnavailable, PauseFailed, and
    what `meanwhile` or the block raises; then the guest runs, and `target` is no use.
    """
    state = domain.state
    refuse_without_memory(domain, state)
    pause = Pause(was_running=state == "running")
    save = _Save(domain, target, _description(domain, target, disks))
    arms = []
    still = False
    try:
        if pause.was_running:
            arms.append(watchdog.arm(domain.uuid, "release", GIVE_UP_S))
        save.carry_out(meanwhile, cancelled, live_patience_s)
        if pause.was_running:  # from here on there is a deadline
            arms.append(watchdog.arm(domain.uuid, "release"))
            for arm in arms:
                watchdog.held(arm)
        faults.point("memory:saved")
        yield pause
        still = domain.state == "paused"
    finally:
        fired = False
        if pause.was_running:
            give_back(domain, watchdog, arms, lambda: domain.held_by_save)
            pause.ms = (time.perf_counter() - save.paused_at) * 1000
            fired = any([watchdog.disarm(arm) for arm in arms])
    if fired or not still:
        raise PauseFailed(
            f"{domain.name} was resumed by somebody else while it was being copied, so memory and "
            "disks are not of one instant and are not kept. The guest runs; try again."
        )
    settle(target)


def refuse_without_memory(domain: Domain, state: State) -> None:
    """Raise ServerNotRunning for a stopped domain."""
    if state == "stopped":
        raise ServerNotRunning(
            f"{domain.name} is off, so it has no memory to keep. Nothing was copied; start it, or "
            "take the snapshot without memory."
        )


class _Save:
    """One save of the memory, in a thread of its own so that it can be cancelled."""

    def __init__(self, domain: Domain, target: Path, xml: str) -> None:
        self.domain, self.target, self.xml = domain, target, xml
        self.paused_at = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._failure: HypervisorError | None = None
        self._told_paused = False

    def carry_out(
        self, meanwhile: Callable[[], None], cancelled: Callable[[], bool], patience_s: float
    ) -> None:
        with self._listening():
            begun = next_time = time.monotonic()
            self._thread.start()
            try:
                faults.point("memory:saving")
                while self._thread.is_alive():
                    self._thread.join(_POLL_S)
                    if cancelled():
                        raise Cancelled(
                            f"The snapshot of {self.domain.name} was cancelled. Nothing was kept."
                        )
                    if time.monotonic() > next_time + _MEANWHILE_S:
                        meanwhile()
                        next_time = time.monotonic()
                    if time.monotonic() > begun + patience_s:
                        self._hold()
            except BaseException:
                self._abort()
                raise
        if self._failure is not None:
            raise MemoryNotSaved(
                f"The memory of {self.domain.name} could not be saved: {self._failure.detail} The "
                "guest runs as before and nothing was kept; take the snapshot without memory if "
                "this comes again."
            ) from self._failure

    def _run(self) -> None:
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        )
        try:
            self.domain.call(
                "Saving the memory of", lambda handle: handle.snapshotCreateXML(self.xml, flags)
            )
        except HypervisorError as error:
            self._failure = error

    def _hold(self) -> None:
        """It would never end: the guest writes faster than its memory is saved."""
        with contextlib.suppress(HypervisorError):  # it may be paused by now
            if self.domain.state == "running":
                self.domain.suspend()

    def _abort(self) -> None:
        deadline = time.monotonic() + _ABORT_PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(HypervisorError):  # it has just ended, or not yet begun
                self.domain.call("Ending the save of", lambda handle: handle.abortJob())
            self._thread.join(_POLL_S)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Take the time at which the guest was paused; where no event tells, since the call."""
        event = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE

        def listen(handle: Any) -> tuple[Any, int]:
            connection = handle.connect()
            return connection, connection.domainEventRegisterAny(handle, event, self._told, None)

        connection, number = self.domain.call("Watching", listen)
        self.paused_at = time.perf_counter()
        try:
            yield
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(number)

    def _told(self, _conn: Any, _dom: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED and not self._told_paused:
            self._told_paused = True
            self.paused_at = time.perf_counter()


def _description(domain: Domain, target: Path, disks: Iterable[str]) -> str:
    """Every disk is named: `manual` ones make libvirt leave the guest paused."""
    snapshot = etree.Element("domainsnapshot")
    etree.SubElement(snapshot, "memory", snapshot="external", file=str(target))
    listed = etree.SubElement(snapshot, "disks")
    wanted = set(disks)
    for disk in DomainDefinition.parse(domain.live_definition()).disks:
        how = "manual" if disk.target in wanted else "no"
        etree.SubElement(listed, "disk", name=disk.target, snapshot=how)
    return etree.tostring(snapshot, encoding="unicode")


def refuse_other_name(uri: str, saved: Path, name: str) -> None:
    """Raise MemoryNotUsable where the memory is of a domain by another name: libvirt refuses it."""
    with translated(f"Reading {saved.name}"):
        was = etree.fromstring(connect(uri).saveImageGetXMLDesc(str(saved))).findtext("name")
    if was != name:
        raise MemoryNotUsable(
            f"The memory was saved when the domain was called {was!r}, and libvirt does not resume "
            f"it as {name!r}. Nothing was changed; rename the domain back (`virsh domrename`), or "
            "revert without the memory."
        )


def resume_from(domain: Domain, saved: Path, *, paused: bool) -> None:
    """Start the stopped domain at the instant of its saved memory; nothing of it is changed.

    Raises MemoryNotUsable where libvirt or QEMU cannot take it, and LibvirtUnavailable.
    """
    flags = libvirt.VIR_DOMAIN_SAVE_PAUSED if paused else libvirt.VIR_DOMAIN_SAVE_RUNNING
    try:
        with translated(f"Resuming the memory of {domain.name}"):
            connect(domain.uri).restoreFlags(os.fspath(saved), None, flags)
    except LibvirtFailed as error:
        raise MemoryNotUsable(
            f"{error.detail} The server was put back as it had been; revert without the memory "
            "to have the disks alone."
        ) from error
