"""Freezing a real guest's file systems."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import libvirt
import pytest

from lab.guest import Guest
from shared.hypervisor import agent, undo, waking, watchdog_helper
from shared.hypervisor.agent import agent_ready, frozen
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import LibvirtBusy, LibvirtFailed, QuiesceFailed
from shared.hypervisor.watchdog import Watchdog
from tests.hypervisor.test_pause import PROMISED_S, soonest, wait_until, worker

pytestmark = pytest.mark.vm


def is_frozen(guest: Guest) -> bool:
    return bool(guest.agent("guest-fsfreeze-status") == "frozen")


def is_thawed(guest: Guest) -> bool:
    with contextlib.suppress(libvirt.libvirtError):  # it does not answer yet
        return not is_frozen(guest)
    return False


def freeze_and_fall_silent(guest: Guest) -> None:
    """The agent answers nothing from then on, for some 15 s, and libvirt has seen that: it sends
    no command then before the agent has answered that it listens."""
    quiet = "sleep 5; kill -STOP $(pidof qemu-ga); sleep 15; kill -CONT $(pidof qemu-ga)"
    guest.agent("guest-exec", path="/bin/sh", arg=["-c", quiet])
    guest.agent("guest-fsfreeze-freeze")
    with pytest.raises(libvirt.libvirtError):
        while True:
            guest.agent("guest-fsfreeze-status", timeout=3)
            time.sleep(0.2)


def test_frozen_inside_thawed_after(guest: Guest, domain: Domain, watchdog: Watchdog) -> None:
    """The guest's file systems are frozen in the block and thawed after it."""
    assert agent_ready(domain)
    with frozen(domain, watchdog, "require") as consistency:
        assert is_frozen(guest)
    assert not is_frozen(guest)
    assert consistency.level == "file-system"
    guest.write("/data/after", "written")


def test_system_is_asked_for_once_a_boot(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a guest is known from then on, of another boot it is not."""
    asked: list[int] = []
    ask = libvirt.virDomain.guestInfo

    def counted(handle: libvirt.virDomain, *arguments: int) -> object:
        asked.append(handle.ID())
        return ask(handle, *arguments)

    monkeypatch.setattr(libvirt.virDomain, "guestInfo", counted)
    boot = domain.call("", lambda handle: handle.ID())
    monkeypatch.setattr(agent, "_systems", {domain.uuid: (boot - 1, "")})
    for _ in range(2):
        with frozen(domain, watchdog, "require") as consistency:
            pass
    assert asked == [boot]
    assert consistency.level == "file-system"
    monkeypatch.setitem(agent._systems, domain.uuid, (boot, "mswindows"))
    with frozen(domain, watchdog, "require") as consistency:
        pass
    assert consistency.level == "application"


@pytest.mark.parametrize("by", ["copy", "failed copy", "undo", "helper", "waking"])
def test_libvirt_waits_for_the_agent_as_before(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """For how long is a setting of the domain: an owner's own freeze may take longer than ours."""
    told: list[int] = []
    tell = libvirt.virDomain.agentSetResponseTimeout

    def noted(handle: libvirt.virDomain, seconds: int, flags: int = 0) -> object:
        told.append(seconds)
        return tell(handle, seconds, flags)

    monkeypatch.setattr(libvirt.virDomain, "agentSetResponseTimeout", noted)
    match by:
        case "copy":
            with frozen(domain, watchdog, "require"):
                pass
        case "failed copy":
            guest.agent("guest-fsfreeze-freeze")
            with frozen(domain, watchdog):
                pass
            guest.agent("guest-fsfreeze-thaw")
        case "undo":
            undo.thaw_domain(domain.uri, domain.uuid)
        case "helper":
            watchdog_helper.give_back(domain.uri, domain.uuid, "thaw", watchdog.holds)
        case "waking":
            assert waking.set_clock(domain) is None
    assert told[0] > 0
    assert told[1:] == [libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK]


def test_an_error_inside_thaws(guest: Guest, domain: Domain, watchdog: Watchdog) -> None:
    """Whatever goes wrong while frozen, the guest is thawed."""
    with pytest.raises(ZeroDivisionError), frozen(domain, watchdog):
        raise ZeroDivisionError
    assert not is_frozen(guest)


def test_never_does_not_freeze(guest: Guest, domain: Domain, watchdog: Watchdog) -> None:
    """`never` takes the guest as it is and says so."""
    with frozen(domain, watchdog, "never") as consistency:
        assert not is_frozen(guest)
    assert (consistency.level, consistency.reason) == ("crash", "quiesce was not asked for")


def test_a_freeze_that_fails(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` goes on as crash consistent with the reason; `require` refuses. A freeze of the
    owner's stays."""
    guest.agent("guest-fsfreeze-freeze")  # a second freeze is an error
    try:
        with frozen(domain, watchdog, "auto") as consistency:
            assert is_frozen(guest)
        assert consistency.level == "crash"
        assert "could not be frozen" in consistency.reason
        assert is_frozen(guest)
        with pytest.raises(QuiesceFailed), frozen(domain, watchdog, "require"):
            pass
        assert is_frozen(guest)
    finally:
        guest.agent("guest-fsfreeze-thaw")
    monkeypatch.setattr(agent, "agent_ready", lambda _domain: False)
    with pytest.raises(QuiesceFailed), frozen(domain, watchdog, "require"):
        pass
    with frozen(domain, watchdog, "auto") as consistency:
        assert not is_frozen(guest)
    assert consistency.reason == "no guest agent answers in the guest"


def test_a_freeze_whose_answer_was_lost_is_thawed(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection went after the guest was frozen, and the agent refuses to freeze once more:
    that is no freeze of the owner's."""
    real, lost = libvirt.virDomain.fsFreeze, libvirt.libvirtError("lost")
    lost.err = (libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_RPC, "client socket is closed")
    asked: list[int] = []

    def lose_the_first(handle: libvirt.virDomain) -> int:
        asked.append(count := real(handle))
        if len(asked) == 1:
            raise lost
        return count

    monkeypatch.setattr(libvirt.virDomain, "fsFreeze", lose_the_first)
    try:
        with frozen(domain, watchdog, "auto") as consistency:
            assert not is_frozen(guest)
        assert len(asked) == 1
        assert "has been disabled" in consistency.reason
    finally:
        guest.agent("guest-fsfreeze-thaw")


def test_a_freeze_that_hangs_is_not_waited_for(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freeze held up in libvirt ends in time, and is thawed when it comes through late."""
    real, go_on, come_through = domain.call, threading.Event(), threading.Event()

    def slow(doing: str, function: object) -> object:
        if doing != "Freezing":
            return real(doing, function)  # type: ignore[arg-type]
        go_on.wait(60)
        try:
            return real(doing, function)  # type: ignore[arg-type]
        finally:
            come_through.set()

    monkeypatch.setattr(domain, "call", slow)
    monkeypatch.setattr(agent, "_GRACE_S", -0.5)
    started = time.monotonic()
    with frozen(domain, watchdog, "auto", timeout_s=1) as consistency:
        assert time.monotonic() - started < 30
    assert consistency.level == "crash"
    go_on.set()
    assert come_through.wait(60)
    wait_until(lambda: not is_frozen(guest))


def test_a_freeze_that_is_over_after_it_was_given_up_is_thawed(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is busy freezing answers nothing, nor a thaw, until it is done."""
    real = domain.call

    def slow(doing: str, function: object) -> object:
        if doing != "Freezing":
            return real(doing, function)  # type: ignore[arg-type]
        freeze_and_fall_silent(guest)
        raise LibvirtFailed("no answer", libvirt_code=libvirt.VIR_ERR_AGENT_UNRESPONSIVE)

    monkeypatch.setattr(domain, "call", slow)
    with frozen(domain, watchdog, "auto", timeout_s=1) as consistency:
        pass

    assert consistency.level == "crash"
    wait_until(lambda: is_thawed(guest), 60)


def test_thaw_is_tried_again(
    guest: Guest, domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thaw that fails at first is repeated."""
    real, failures = domain.call, [1, 2]

    def stubborn(doing: str, function: object) -> object:
        if doing == "Thawing" and failures:
            failures.pop()
            raise LibvirtFailed("not now")
        return real(doing, function)  # type: ignore[arg-type]

    monkeypatch.setattr(domain, "call", stubborn)
    with frozen(domain, watchdog, "require"):
        pass
    assert not is_frozen(guest)


def test_a_guest_that_went_off_is_not_thawed(
    guest: Guest, domain: Domain, watchdog: Watchdog
) -> None:
    """Its power was cut while it was frozen: nobody waits for an agent that is gone."""
    with frozen(domain, watchdog, "require") as consistency:
        guest.destroy()
        began = time.monotonic()
    took = time.monotonic() - began
    guest.start()

    assert took < 5
    assert consistency.level == "file-system"  # what was copied before it went off was frozen


def test_a_guest_that_was_saved_while_it_was_frozen_is_thawed_once_it_wakes(
    guest: Guest, domain: Domain, watchdog: Watchdog
) -> None:
    """As when its host goes down meanwhile, which saves its guests: it wakes as it was."""
    with frozen(domain, watchdog, "require") as consistency:
        guest.domain.managedSave()
    assert consistency.level == "crash"
    guest.domain.create()
    wait_until(lambda: is_thawed(guest), 60)
    guest.write("/data/after", "written")


def test_a_killed_workers_guest_is_thawed_within_two_seconds(guest: Guest) -> None:
    """SIGKILL between freeze and thaw: the helper thaws."""

    def killed() -> float:
        process = worker(
            guest,
            """
            from shared.hypervisor.agent import frozen
            with frozen(domain, watchdog, "require"):
                print("frozen", flush=True)
                time.sleep(60)
            """,
        )
        assert process.stdout
        assert process.stdout.readline() == "frozen\n"
        assert is_frozen(guest)
        process.kill()
        process.wait()
        return wait_until(lambda: not is_frozen(guest))

    assert soonest(killed) < PROMISED_S


@pytest.mark.parametrize("held", [False, True], ids=["running", "paused"])
def test_what_a_killed_helper_owed_is_thawed_by_the_next_worker(
    guest: Guest,
    domain: Domain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: bool,
) -> None:
    """The container goes while its helper still tries, for which no journal has an entry. A guest
    that is paused by then is waited for."""
    watchdog = Watchdog("qemu+unix:///system?socket=/nowhere", tmp_path)
    watchdog.fire(watchdog.arm(domain.uuid, "thaw"))
    assert watchdog.pid
    os.kill(watchdog.pid, signal.SIGKILL)
    watchdog.close()
    guest.agent("guest-fsfreeze-freeze")
    looks: list[bool | None] = []
    real = watchdog_helper._attempt
    monkeypatch.setattr(
        watchdog_helper, "_attempt", lambda *given: looks.append(found := real(*given)) or found
    )
    if held:
        domain.suspend()

    watchdog_helper.thaw_owed(domain.uri, tmp_path)

    if held:
        wait_until(lambda: len(looks) > 1, 60)
        domain.resume()
    wait_until(lambda: not is_frozen(guest), 60)
    wait_until(lambda: not list(tmp_path.glob(f"*{watchdog_helper.OWED}")), 60)


def test_undo_is_not_done_while_the_agent_does_not_answer(
    guest: Guest, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be busy freezing: who undoes is told to try again, up to a limit."""
    monkeypatch.setattr(undo, "FREEZE_TIMEOUT_S", 1)
    freeze_and_fall_silent(guest)
    with pytest.raises(LibvirtBusy):
        undo.thaw_domain(domain.uri, domain.uuid)
    with monkeypatch.context() as impatient:
        impatient.setattr(undo, "_THAW_PATIENCE_S", 0)
        assert not undo.thaw_domain(domain.uri, domain.uuid)

    def thawed() -> bool:
        with contextlib.suppress(LibvirtBusy):
            return undo.thaw_domain(domain.uri, domain.uuid)
        return False

    wait_until(thawed, 60)
    assert not is_frozen(guest)


def test_undo_thaws_and_may_be_called_for_nothing(guest: Guest, domain: Domain) -> None:
    """Crash recovery thaws a frozen guest; on one that is not it does nothing."""
    guest.agent("guest-fsfreeze-freeze")
    assert undo.thaw_domain(domain.uri, domain.uuid)
    assert not is_frozen(guest)
    assert not undo.thaw_domain(domain.uri, domain.uuid)


def test_a_paused_guest_is_not_frozen(domain: Domain, watchdog: Watchdog) -> None:
    """A guest its owner paused cannot freeze: `auto` says so, `require` refuses."""
    domain.suspend()
    try:
        with frozen(domain, watchdog, "auto") as consistency:
            pass
        assert consistency.reason == "the guest was paused by its owner"
        with pytest.raises(QuiesceFailed), frozen(domain, watchdog, "require"):
            pass
    finally:
        domain.resume()
