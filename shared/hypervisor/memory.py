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
from typing import Any, Literal

import libvirt
from lxml import etree

from shared import faults
from shared.hypervisor.backup import settle
from shared.hypervisor.connection import connect, translated
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import (
    HypervisorError,
    LibvirtFailed,
    LibvirtUnavailable,
    MemoryNotSaved,
    MemoryNotUsable,
    PauseFailed,
    ServerNotRunning,
    WatchdogUnavailable,
)
from shared.hypervisor.guest_exec import is_frozen
from shared.hypervisor.pause import Pause, give_back
from shared.hypervisor.saving import STEP_S, end_save, forget, is_stilled, note_of, still, wake
from shared.hypervisor.watchdog import DEADLINE_S, GIVE_UP_S, Watchdog

Held = Literal["memory", "pause"]
_POLL_S = 0.1
_CHECK_S = 0.05
_MEANWHILE_S = 1.0
_ABORT_PATIENCE_S = 60.0


@contextlib.contextmanager
def memory_saved(
    domain: Domain,
    watchdog: Watchdog,
    target: Path,
    disks: Iterable[str],
    *,
    before: Callable[[Held], None] = lambda _held: None,
    meanwhile: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
    most_bytes: int | None = None,
    deadline_s: float = DEADLINE_S,
) -> Iterator[Pause]:
    """The guest is still inside, at the instant of the memory in `target`; it runs on after it.

    `disks` are the targets that are copied inside. `before` is called ahead of what the journal
    must know: the "memory" being saved, and a "pause" of ours. While the memory is being written
    `meanwhile` is called about once a second, and ten times `check`, whose error ends it. A guest
    that writes its memory faster than it is saved is paused once `most_bytes` are written, as many
    as it has RAM if not given. `Pause.ms` is what the guest felt: from the moment libvirt told of
    the pause until resume had returned. A pause that its owner asks for meanwhile stays. After
    `deadline_s` seconds of it the watchdog resumes the guest although we live.

    Raises ServerNotRunning, LibvirtBusy, MemoryNotSaved, WatchdogUnavailable, PauseFailed,
    and what `meanwhile`, `check` or the block raises; then the guest runs, and `target` is no use.
    """
    refuse_without_memory(domain)
    domain.refuse_other_job(check)  # what undoes the save cannot tell it from another's
    before("memory")
    save = _Save(domain, watchdog, target, _description(domain, target, disks), before, deadline_s)
    pause = Pause(was_running=True)
    still = False
    try:
        save.carry_out(meanwhile, check, domain.memory_bytes if most_bytes is None else most_bytes)
        faults.point("memory:saved")
        yield pause
        still = domain.state == "paused"
    finally:
        try:
            give_back(domain, watchdog, save.arms, save.holds, look_first=True)
            forget(save.note)
        finally:
            pause.ms = (time.perf_counter() - save.paused_at) * 1000
            fired = any([watchdog.disarm(arm) for arm in save.arms])
    if fired or not still or domain.state != "running":
        raise PauseFailed(
            f"{domain.name} was paused or resumed by somebody else while it was being copied, so "
            "memory and disks may not be of one instant and are not kept. It is as they left it; "
            "try again."
        )
    if is_frozen(domain):
        raise MemoryNotSaved(
            f"The file systems of {domain.name} were frozen by somebody, and who wakes from such a "
            "memory is frozen. The guest runs as it was and nothing was kept; thaw it (`virsh "
            f"domfsthaw {domain.name}`), or wait for who froze it, and try again."
        )
    settle(target)


def refuse_without_memory(domain: Domain) -> None:
    """Raise ServerNotRunning for a domain that is off, or that its owner has paused.

    Of the latter QEMU would hold the images inactive for as long as it is paused, and neither
    guard them with its locks nor copy them.
    """
    state = domain.state
    if state != "running":
        do = "start" if state == "stopped" else "resume"
        raise ServerNotRunning(
            f"{domain.name} is {state}, and memory is kept of a guest that runs. Nothing was "
            f"copied; {do} it, or ask for a copy without memory."
        )


class _Save:
    """One save of the memory, in a thread of its own so that it can be ended."""

    def __init__(
        self,
        domain: Domain,
        watchdog: Watchdog,
        target: Path,
        xml: str,
        before: Callable[[Held], None],
        deadline_s: float,
    ) -> None:
        self.domain, self.watchdog, self.target, self.xml = domain, watchdog, target, xml
        self.note = note_of(watchdog.holds, domain.uuid)
        self.arms = [watchdog.arm(domain.uuid, "release", GIVE_UP_S)]
        forget(self.note)  # it runs: what an earlier one left tells of a domain that went since
        self.paused_at = time.perf_counter()
        self._before, self._deadline_s = before, deadline_s
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._failure: Exception | None = None
        self._told_paused = self._held = False

    def holds(self) -> bool:
        """Whether the guest is paused by this save, and not because its owner asked for it."""
        if self.domain.held_by_save:
            return True
        return (self._held or is_stilled(self.note)) and self.domain.paused_by_user

    def carry_out(
        self, meanwhile: Callable[[], None], check: Callable[[], None], most_bytes: int
    ) -> None:
        with self._listening():
            next_time = time.monotonic() + _MEANWHILE_S
            self._thread.start()
            try:
                faults.point("memory:saving")
                while self._thread.is_alive():
                    self._thread.join(_POLL_S)
                    check()
                    if time.monotonic() > next_time:
                        meanwhile()
                        next_time = time.monotonic() + _MEANWHILE_S
                    if self._written() > most_bytes:
                        self._hold()
            except BaseException:
                self._abort()
                raise
        if self._failure is not None:
            raise MemoryNotSaved(
                f"The memory of {self.domain.name} could not be saved: {self._failure} The "
                "guest runs as before and nothing was kept; do without memory if this comes again."
            ) from self._failure

    def _run(self) -> None:
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        )
        tries = 0

        def save(handle: Any) -> None:
            nonlocal tries
            tries += 1
            if tries > 1:
                wake(handle, self.note)
            handle.snapshotCreateXML(self.xml, flags)

        try:
            self.domain.call("Saving the memory of", save)
            # Paused now: from here on there is a deadline, whatever the other thread is at.
            self.arms.append(self.watchdog.arm(self.domain.uuid, "release", self._deadline_s))
            if self._held:
                self.arms.append(self.watchdog.arm(self.domain.uuid, "resume", self._deadline_s))
            for arm in self.arms:
                self.watchdog.held(arm)
        except Exception as error:
            self._failure = error
            if isinstance(error, LibvirtUnavailable):
                with contextlib.suppress(HypervisorError):  # the journal tries again
                    self.domain.call("Waking", lambda handle: wake(handle, self.note))

    def _written(self) -> int:
        with contextlib.suppress(FileNotFoundError):  # not yet, or not any more
            return self.target.stat().st_size
        return 0

    def _hold(self) -> None:
        """It might never end: the guest writes faster than its memory is saved."""
        if self._held or self.domain.state != "running":
            return
        self._before("pause")
        self.arms.append(self.watchdog.arm(self.domain.uuid, "resume", GIVE_UP_S))
        self._held = True
        with contextlib.suppress(HypervisorError):  # it may be paused by now
            self.domain.call("Pausing", lambda handle: still(handle, self.note))

    def _abort(self) -> None:
        with contextlib.suppress(WatchdogUnavailable):  # for where we hang, with the guest held
            self.arms.append(self.watchdog.arm(self.domain.uuid, "release", self._deadline_s))
        deadline = time.monotonic() + _ABORT_PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(HypervisorError):
                self.domain.call("Ending the save of", lambda handle: end_save(handle, self.note))
            self._thread.join(STEP_S)

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


def definition_in(uri: str, saved: Path) -> str:
    """The definition that libvirt resumes the memory by."""
    with translated(f"Reading {saved.name}"):
        return str(connect(uri).saveImageGetXMLDesc(str(saved)))


def refuse_other_name(definition: str, name: str) -> None:
    """Raise MemoryNotUsable where the memory is of a domain by another name: libvirt refuses it."""
    was = DomainDefinition.parse(definition).name
    if was != name:
        raise MemoryNotUsable(
            f"The memory was saved when the domain was called {was!r}, and libvirt does not resume "
            f"it as {name!r}. Nothing was changed; rename the domain back (`virsh domrename`), or "
            "revert without the memory."
        )


def resume_from(domain: Domain, saved: Path, *, check: Callable[[], None] = lambda: None) -> None:
    """Start the stopped domain at the instant of its saved memory; nothing of it is changed.

    Raises what `restore` does.
    """
    restore(
        domain,
        saved,
        libvirt.VIR_DOMAIN_SAVE_RUNNING,
        "The server was put back as it had been; revert without the memory, for the disks alone.",
        check,
    )


def restore(
    domain: Domain, saved: Path, flags: int, otherwise: str, check: Callable[[], None]
) -> None:
    """Bring up a defined domain that is off from a save file with its name and UUID.

    `check` is called meanwhile, and its error ends it, with the domain off, unless somebody has
    booted it by then. Raises MemoryNotUsable where libvirt or QEMU cannot take the memory, which
    ends by saying what is to be done `otherwise`, and LibvirtUnavailable.
    """
    failure: list[HypervisorError] = []
    thread = threading.Thread(
        target=_restore, args=(domain, saved, flags, otherwise, failure), daemon=True
    )
    thread.start()
    try:
        while thread.is_alive():
            check()
            thread.join(_CHECK_S)
    except BaseException:
        alive = True
        while alive:  # also where QEMU was not there yet; once more when it may be up
            alive = thread.is_alive()
            with contextlib.suppress(HypervisorError):
                if not domain.was_booted:
                    domain.destroy()
            thread.join(_CHECK_S)
        raise
    if failure:
        raise failure[0]


def _restore(
    domain: Domain, saved: Path, flags: int, otherwise: str, failure: list[HypervisorError]
) -> None:
    try:
        with translated(f"Restoring the memory of {domain.name}"):
            connect(domain.uri).restoreFlags(os.fspath(saved), None, flags)
    except LibvirtFailed as error:
        unusable = MemoryNotUsable(f"{error.detail} {otherwise}")
        unusable.__cause__ = error
        failure.append(unusable)
    except HypervisorError as error:
        failure.append(error)
