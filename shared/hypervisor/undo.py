"""Undoing what a dead worker left at the hypervisor, from its journal.

Every function may be called when the step it undoes never happened, was
already undone, or when the domain is gone: then it does nothing and says so by
returning False. Each raises LibvirtUnavailable when libvirt does not answer, so
that the caller tries again later.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import libvirt

from shared.file_systems import keeps_locks
from shared.hypervisor import backup
from shared.hypervisor.agent import FREEZE_TIMEOUT_S, agent_ready, unanswered
from shared.hypervisor.agent_timeout import answers_within
from shared.hypervisor.backup import job_files
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition, renamed
from shared.hypervisor.domains import Domain, State, define, find
from shared.hypervisor.errors import DomainMissing, LibvirtBusy, LibvirtFailed
from shared.hypervisor.locks import is_open
from shared.hypervisor.saving import STEP_S, end_save, forget, note_of

log = logging.getLogger(__name__)

_ABORT_PATIENCE_S = 60.0
_THAW_PATIENCE_S = 60.0
_AT_ONCE_S = 0.1
_SUSPEND_S = 1.0
_LOOK_S = 0.02
_silent_since: dict[str, float] = {}
"""Domains whose agent did not answer a thaw, and when that was first seen."""


def resume_domain(uri: str, uuid: str) -> bool:
    """Resume a domain that is paused because somebody asked for it, or is about to be.

    libvirt carries a suspend out whose caller has died, and says until then that the domain runs:
    so it is asked to resume such a one too, which waits for that. Only for domains that ran when
    the journal entry was made: an owner's pause looks the same. Raises LibvirtBusy.
    """
    domain = _find(uri, uuid)
    if domain is None or not (domain.state == "running" or domain.paused_by_user):
        return False  # in this order: it may be paused between the two
    asked = time.monotonic()
    try:
        domain.resume()
    except LibvirtFailed as error:  # it ran, with no suspend before the resume's turn
        if error.extra.get("libvirt_code") != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
        waited = time.monotonic() - asked
        if waited < _AT_ONCE_S:
            return False
        # A suspend may have waited for the same job, and come second: on a host that is as slow.
        until = time.monotonic() + max(_SUSPEND_S, waited)
        while not domain.paused_by_user:
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_S)
        domain.resume()
    return True


def release_memory(uri: str, uuid: str, holds: Path) -> bool:
    """End a save of the memory that still runs, and resume the domain from the pause it leaves.

    Only for domains that ran when the journal entry was made; `holds` is the watchdogs' directory.
    Raises LibvirtBusy if it does not end.
    """
    domain, note = _find(uri, uuid), note_of(holds, uuid)
    if domain is None:
        forget(note)
        return False
    deadline = time.monotonic() + _ABORT_PATIENCE_S

    while True:
        with contextlib.suppress(LibvirtFailed):  # another came in between, or it went down
            resumed = domain.call("Ending the save of", lambda handle: end_save(handle, note))
            if resumed is not None:
                return resumed
        if time.monotonic() > deadline:
            raise LibvirtBusy(f"The save of {domain.name} does not end; try again later.")
        time.sleep(STEP_S)


def thaw_domain(uri: str, uuid: str) -> bool:
    """Thaw a running domain's file systems. Thawing what is not frozen does nothing.

    An agent that does not answer may be about to freeze them: LibvirtBusy is raised for a minute
    of that, for the caller to try again, and see to other guests in between.
    """
    domain = _find(uri, uuid)
    if domain is None or domain.state != "running":
        return False

    def thaw(handle: libvirt.virDomain) -> int:
        with answers_within(handle, FREEZE_TIMEOUT_S):
            return int(handle.fsThaw())

    try:
        thawed = domain.call("Thawing", thaw) > 0
    except LibvirtFailed as error:
        thawed = False  # no agent: it was never frozen
        if unanswered(error) and agent_ready(domain):
            since = _silent_since.setdefault(uuid, time.monotonic())
            told = f"{domain.name} may be frozen, and its agent does not answer: {error.detail}"
            if time.monotonic() - since < _THAW_PATIENCE_S:
                raise LibvirtBusy(f"{told} It is tried again.") from error
            log.error("%s `virsh domfsthaw %s` thaws it once it does.", told, domain.name)
    _silent_since.pop(uuid, None)
    return thawed


def abort_backup(uri: str, uuid: str, folder: str | None = None) -> bool:
    """End a backup job that still runs, and wait until QEMU has let go of its files.

    One that writes elsewhere than into `folder`, if that is given, is somebody else's; that and
    jobs of other kinds are left alone. Raises LibvirtBusy if it does not end.
    """
    domain = _find(uri, uuid)
    if domain is None:
        return False

    def ours(stats: dict[str, Any]) -> bool:
        if not _copying(stats):
            return False
        return folder is None or Path(folder) in {path.parent for path in job_files(domain)}

    return _end_job(domain, ours)


def go_on(uri: str, uuid: str, make_room: Callable[[], None] = lambda: None) -> bool:
    """Have a domain go on that ran, and stopped at a write while it was copied."""
    domain = _find(uri, uuid)
    if domain is None or not domain.halted_by_io:
        return False
    make_room()
    return backup.go_on(domain)


def _end_job(domain: Domain, ours: Callable[[dict[str, Any]], bool]) -> bool:
    """Abort the domain's job while it is one of `ours`; whether there was one."""
    deadline = time.monotonic() + _ABORT_PATIENCE_S
    found = False
    while ours(_job(domain)):
        found = True
        if time.monotonic() > deadline:
            raise LibvirtBusy(f"The copy job of {domain.name} does not end; try again later.")
        with contextlib.suppress(LibvirtFailed):  # it ended in between
            domain.call("Ending the copy of", lambda handle: handle.abortJob())
        time.sleep(0.5)
    return found


def _copying(stats: dict[str, Any]) -> bool:
    ours = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
    return bool(ours and stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE))


def _job(domain: Domain) -> dict[str, Any]:
    if domain.is_active:
        with contextlib.suppress(LibvirtFailed):  # it went down in between
            return dict(domain.call("Following the jobs of", lambda handle: handle.jobStats()))
    return {}


def undefine_domain(
    uri: str, uuid: str, *, keep_nvram: bool = False, keep_tpm: bool = False
) -> bool:
    """Force off and undefine a domain, with its UEFI variables and its TPM's state unless told
    otherwise.

    For domains that we defined ourselves and nothing else. Its disks stay.
    """
    domain = _find(uri, uuid)
    if domain is None:
        return False
    domain.destroy()
    domain.undefine(keep_nvram=keep_nvram, keep_tpm=keep_tpm)
    return True


def define_domain(uri: str, xml: str) -> bool:
    """Define (or redefine) a domain as it was, by the name that its owner may have given it since:
    libvirt refuses another one for its UUID."""
    domain = _find(uri, DomainDefinition.parse(xml).uuid)
    define(connect(uri), renamed(xml, domain.name) if domain else xml)
    return True


def start_domain(uri: str, uuid: str, *, paused: bool = False) -> bool:
    """Start a domain that is off."""
    domain = _find(uri, uuid)
    if domain is None or domain.is_active:
        return False
    domain.start(paused=paused)
    return True


def stop_domain(uri: str, uuid: str, *, resumed: bool = False, boot: int | None = None) -> bool:
    """Force a domain off, but one that is still in the `boot` that it was in before; if it was
    `resumed` from its memory, not one that was booted since."""
    domain = _find(uri, uuid)
    if domain is None or not domain.is_active or domain.boot == boot:
        return False
    if resumed and domain.was_booted:
        return False
    domain.destroy()
    return True


def state_on(uri: str, uuid: str, files: Iterable[Path]) -> State:
    """The state to bring a domain back to that has one of `files` open; "stopped" if none has.
    Where the file system may not tell, one that is on has, and one that is being started may."""
    domain = _find(uri, uuid)
    if domain is None or (state := domain.wanted_state) == "stopped":
        return "stopped"
    if domain.is_being_started or any(is_open(each) or not keeps_locks(each) for each in files):
        return state
    return "stopped"


def is_on(uri: str, uuid: str) -> bool:
    """Whether there is such a domain, and it is not off."""
    domain = _find(uri, uuid)
    return domain is not None and domain.is_active


def drop_saved_state(uri: str, uuid: str) -> bool:
    """Drop the memory that a domain that is off was saved with: its disks are to be others."""
    domain = _find(uri, uuid)
    if domain is None or not domain.has_managed_save:
        return False
    log.warning("%s was saved on disks that are exchanged now: its memory is dropped.", domain.name)
    domain.remove_managed_save()
    return True


def _find(uri: str, uuid: str) -> Domain | None:
    try:
        return find(connect(uri), uuid)
    except DomainMissing:
        return None
