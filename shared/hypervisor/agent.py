"""Freezing a guest's file systems through its agent, and saying what that was worth.

Owns: freeze and thaw. The thaw is armed before the freeze, and a freeze that
hangs is not waited for: libvirt has been seen to hold one for hours past its
timeout (oVirt/vdsm #160). No other agent command is sent while frozen: the agent
answers only a few then.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import libvirt
from lxml import etree

from shared.hypervisor.agent_timeout import unlimited
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import (
    DomainMissing,
    HypervisorError,
    LibvirtFailed,
    LibvirtUnavailable,
    QuiesceFailed,
)
from shared.hypervisor.watchdog import Arm, Watchdog

log = logging.getLogger(__name__)

Policy = Literal["auto", "require", "never"]
Level = Literal["application", "file-system", "crash"]

CHANNEL = "org.qemu.guest_agent.0"
FROZEN = "its file systems were frozen through the guest agent"
NO_AGENT = "no guest agent answers in the guest"
"""Reasons of a consistency that also tell, of a stored copy, whether its guest has an agent."""
FREEZE_TIMEOUT_S = 10
# libvirt first synchronises with the agent, which has its own 5 s.
_GRACE_S = 6.0
_HOLD_S = 30.0
_THAW_PATIENCE_S = 15.0
_NOT_DONE = "has been disabled"
"""What qemu-ga says of a command that it does not carry out (qga/main.c): one that its owner took
away, and, while file systems are frozen, all but a few."""
_UNANSWERED = (
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
    getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", None),  # since libvirt 11.2
)


class FreezeRefused(LibvirtFailed):
    """The agent carried no freeze out"""


@dataclass
class Consistency:
    """What a copy of the guest taken now is good for, and why. Final after the block."""

    level: Level
    reason: str
    thawed: bool = False
    """Whether what was frozen for it was thawed at once."""


def agent_ready(domain: Domain) -> bool:
    """Whether the guest agent's channel is connected inside the guest."""
    if domain.state != "running":
        return False
    root = etree.fromstring(domain.live_definition())
    targets = root.iterfind(f"devices/channel/target[@name='{CHANNEL}']")
    return any(target.get("state") == "connected" for target in targets)


def unanswered(error: HypervisorError) -> bool:
    """Whether what the agent was asked for may come true yet: it reads its channel when it is
    done with what it is at."""
    code = error.extra.get("libvirt_code")
    return isinstance(error, LibvirtUnavailable) or (code is not None and code in _UNANSWERED)


@contextlib.contextmanager
def frozen(
    domain: Domain,
    watchdog: Watchdog,
    policy: Policy = "auto",
    *,
    state: State | None = None,
    timeout_s: int = FREEZE_TIMEOUT_S,
    refused: Callable[[], None] = lambda: None,
) -> Iterator[Consistency]:
    """Freeze the guest's file systems inside, thaw them on every way out. Where the agent carries
    out no freeze, as while they are frozen by the owner, `refused` is called and nothing thawed.

    Keep the block short: the guest cannot write, and Windows holds a freeze for
    10 s at most. `auto` goes on without and says why; `require` raises
    QuiesceFailed. A guest that does not run has nothing to freeze; `state` spares asking whether
    it does.
    """
    at_rest = _without_freeze(domain, policy, state or domain.state)
    if at_rest is not None:
        yield at_rest
        return
    arm = watchdog.arm(domain.uuid, "thaw", timeout_s + _GRACE_S + _HOLD_S)
    try:
        level = _level(domain, timeout_s)
        _freeze(domain, watchdog, arm, timeout_s)
    except HypervisorError as error:
        if isinstance(error, FreezeRefused):
            refused()
        if policy == "require":
            raise QuiesceFailed(
                f"{domain.name} could not be frozen: {error.detail} Nothing was copied. "
                "Check the guest agent, or ask for quiesce: auto."
            ) from error
        yield Consistency("crash", f"the guest could not be frozen: {error.detail}")
        return
    consistency = Consistency(level, FROZEN)
    try:
        yield consistency
    finally:
        thawed = _thaw(domain, watchdog, arm)
        consistency.thawed = thawed
        if watchdog.disarm(arm) or (not thawed and level == "application"):
            # Windows lets go by itself after 10 s, perhaps before the copy's instant.
            consistency.level = "crash"
            consistency.reason = "the guest did not stay frozen until the copy was taken"


def _without_freeze(domain: Domain, policy: Policy, state: State) -> Consistency | None:
    """What holds without freezing, or None if the guest is to be frozen."""
    if state == "stopped":
        if domain.has_managed_save:
            return Consistency("crash", "the server's memory was saved to disk apart from this")
        if domain.was_shut_down:
            return Consistency("application", "the server was shut down")
        return Consistency("crash", "the server was off, and how it went off is not known")
    if policy == "never":
        return Consistency("crash", "quiesce was not asked for")
    reason = ""
    if state == "paused":
        reason = "the guest was paused by its owner"
    elif not agent_ready(domain):
        reason = NO_AGENT
    if reason and policy == "require":
        raise QuiesceFailed(
            f"{domain.name} could not be frozen: {reason}. Nothing was copied. "
            "Check the guest agent, or ask for quiesce: auto."
        )
    return Consistency("crash", reason) if reason else None


_systems: dict[str, tuple[int, str]] = {}
"""The system in each domain, by UUID, and the boot (libvirt's number of it) in which it told."""


def _level(domain: Domain, timeout_s: int) -> Level:
    """Have the agent answer in time, the first time what system it is in: Windows' freeze goes
    through VSS, which has applications write out their state."""

    def ask(handle: libvirt.virDomain) -> str:
        handle.agentSetResponseTimeout(timeout_s)
        boot, system = _systems.get(domain.uuid, (None, ""))
        if boot != handle.ID():
            system = str(handle.guestInfo(libvirt.VIR_DOMAIN_GUEST_INFO_OS).get("os.id", ""))
            _systems[domain.uuid] = handle.ID(), system
        return system

    with contextlib.suppress(HypervisorError):
        return "application" if domain.call("Asking", ask) == "mswindows" else "file-system"
    return "file-system"


def _freeze(domain: Domain, watchdog: Watchdog, arm: Arm, timeout_s: int) -> None:
    """Freeze within `timeout_s` seconds. On any failure the guest is thawed, `arm` spent; but a
    freeze of its owner's, for which the agent does not carry ours out, is left.

    Where the agent did not answer in time, the guest may freeze long after: the watchdog goes on
    trying to thaw it then, and is not waited for.
    """
    outcome: list[HypervisorError | None] = []
    over = threading.Event()
    late = threading.Event()
    asked = 0

    def freeze(handle: libvirt.virDomain) -> None:
        nonlocal asked
        asked += 1
        handle.fsFreeze()

    def run() -> None:
        try:
            domain.call("Freezing", freeze)
            outcome.append(None)
        except HypervisorError as error:
            outcome.append(error)
        finally:
            over.set()
        if late.is_set():
            _thaw(domain, watchdog, arm)
            watchdog.disarm(arm)

    threading.Thread(target=run, name=f"freeze-{domain.name}", daemon=True).start()
    if not over.wait(timeout_s + _GRACE_S):
        late.set()
        if not over.is_set():
            raise QuiesceFailed(f"the agent did not answer within {timeout_s} s.")
    if outcome[0] is not None or late.is_set():
        failure = outcome[0] or QuiesceFailed(f"the agent did not answer within {timeout_s} s.")
        if unanswered(failure):
            watchdog.fire(arm)  # which has a time limit of its own
            raise failure
        if asked == 1 and _NOT_DONE in failure.detail:
            _give_time(domain)
            watchdog.disarm(arm)
            raise FreezeRefused(failure.detail) from failure
        _thaw(domain, watchdog, arm, patience_s=0)
        watchdog.disarm(arm)
        raise failure


def _thaw(
    domain: Domain, watchdog: Watchdog, arm: Arm, patience_s: float = _THAW_PATIENCE_S
) -> bool:
    """Thaw, trying for `patience_s` seconds; then the watchdog goes on. True if at once."""
    deadline = time.monotonic() + patience_s
    first = True
    while True:
        try:
            domain.call("Thawing", lambda handle: handle.fsThaw())
            _give_time(domain)
            return first
        except DomainMissing:
            return False
        except HypervisorError as error:
            first = False
            if _is_off(domain):  # what boots next is not frozen, what wakes up is
                if _is_saved(domain):
                    watchdog.fire(arm)
                return False
            if time.monotonic() >= deadline:
                if patience_s:
                    log.error("%s does not thaw: %s", domain.name, error.detail)
                    watchdog.fire(arm)
                else:
                    _give_time(domain)
                return False
        time.sleep(0.2)


def _give_time(domain: Domain) -> None:
    with contextlib.suppress(HypervisorError):
        domain.call("Asking", unlimited)


def _is_off(domain: Domain) -> bool:
    with contextlib.suppress(HypervisorError):
        return not domain.is_active
    return False


def _is_saved(domain: Domain) -> bool:
    with contextlib.suppress(HypervisorError):
        return domain.has_managed_save
    return False
