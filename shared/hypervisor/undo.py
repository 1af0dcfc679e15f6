"""Undoing what a dead worker left at the hypervisor, from its journal.

Every function may be called when the step it undoes never happened, was
already undone, or when the domain is gone: then it does nothing and says so by
returning False. Each raises LibvirtUnavailable when libvirt does not answer, so
that the caller tries again later.
"""

import contextlib
import time

import libvirt

from shared.hypervisor.agent import FREEZE_TIMEOUT_S
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, define, find
from shared.hypervisor.errors import DomainMissing, LibvirtBusy, LibvirtFailed

_ABORT_PATIENCE_S = 60.0


def resume_domain(uri: str, uuid: str) -> bool:
    """Resume a domain that is paused because somebody asked for it.

    Only for domains that ran when the journal entry was made: an owner's pause
    looks the same.
    """
    domain = _find(uri, uuid)
    if domain is None or not domain.paused_by_user:
        return False
    domain.resume()
    return True


def thaw_domain(uri: str, uuid: str) -> bool:
    """Thaw a running domain's file systems. Thawing what is not frozen does nothing."""
    domain = _find(uri, uuid)
    if domain is None or domain.state != "running":
        return False

    def thaw(handle: libvirt.virDomain) -> int:
        handle.agentSetResponseTimeout(FREEZE_TIMEOUT_S)
        return int(handle.fsThaw())

    with contextlib.suppress(LibvirtFailed):  # no agent: it was never frozen
        return domain.call("Thawing", thaw) > 0
    return False


def abort_backup(uri: str, uuid: str) -> bool:
    """End a backup job that still runs, and wait until QEMU has let go of its files.

    Jobs of other kinds are left alone. Raises LibvirtBusy if it does not end.
    """
    domain = _find(uri, uuid)
    if domain is None or not _copying(domain):
        return False
    deadline = time.monotonic() + _ABORT_PATIENCE_S
    while _copying(domain):
        if time.monotonic() > deadline:
            raise LibvirtBusy(f"The copy job of {domain.name} does not end; try again later.")
        with contextlib.suppress(LibvirtFailed):  # it ended in between
            domain.call("Ending the copy of", lambda handle: handle.abortJob())
        time.sleep(0.5)
    return True


def _copying(domain: Domain) -> bool:
    if not domain.is_active:
        return False
    with contextlib.suppress(LibvirtFailed):  # it went down in between
        stats = domain.call("Following the jobs of", lambda handle: handle.jobStats())
        ours = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        return bool(ours and stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE))
    return False


def undefine_domain(uri: str, uuid: str) -> bool:
    """Force off and undefine a domain with its UEFI variables and TPM state.

    For clones that we defined ourselves and nothing else. Its disks stay.
    """
    domain = _find(uri, uuid)
    if domain is None:
        return False
    domain.destroy()
    domain.undefine(keep_nvram=False, keep_tpm=False)
    return True


def define_domain(uri: str, xml: str) -> bool:
    """Define (or redefine) a domain as it was."""
    define(connect(uri), xml)
    return True


def start_domain(uri: str, uuid: str, *, paused: bool = False) -> bool:
    """Start a domain that is off."""
    domain = _find(uri, uuid)
    if domain is None or domain.is_active:
        return False
    domain.start(paused=paused)
    return True


def stop_domain(uri: str, uuid: str) -> bool:
    """Force a domain off."""
    domain = _find(uri, uuid)
    if domain is None or not domain.is_active:
        return False
    domain.destroy()
    return True


def _find(uri: str, uuid: str) -> Domain | None:
    try:
        return find(connect(uri), uuid)
    except DomainMissing:
        return None
