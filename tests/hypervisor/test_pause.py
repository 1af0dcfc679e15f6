"""Holding a real guest still, and giving it back whatever happens to the worker."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.guest import Guest
from lab.libvirtd import Hypervisor
from lab.processes import holder_of, is_gone
from shared.hypervisor import undo
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import LibvirtFailed, PauseFailed, WatchdogUnavailable
from shared.hypervisor.pause import paused
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm
ROOT = Path(__file__).resolve().parents[2]


PATIENCE_S = 60.0
"""For what is not promised to come sooner."""


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> float:
    """Seconds until `condition` held; fails after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it never happened"
        time.sleep(0.02)
    return time.monotonic() - started


PROMISED_S, TRIES = 2, 3


def soonest(attempt: Callable[[], float]) -> float:
    """Of what is promised within two seconds, the best of a few tries."""
    took = [attempt()]
    while min(took) >= PROMISED_S and len(took) < TRIES:
        took.append(attempt())
    return min(took)


def holds(hypervisor: Hypervisor) -> Path:
    """Where the workers of a hypervisor tell each other whose guest they hold."""
    return hypervisor.state_dir / "holds"


def worker(guest: Guest, body: str) -> "subprocess.Popen[str]":
    """A worker process that runs `body` with `domain` and `watchdog` at hand."""
    program = f"""
        import os, sys, time
        from pathlib import Path
        from shared.hypervisor.connection import connect
        from shared.hypervisor.domains import find
        from shared.hypervisor.pause import paused
        from shared.hypervisor.watchdog import Watchdog
        domain = find(connect({guest.hypervisor.uri!r}), {guest.domain.UUIDString()!r})
        watchdog = Watchdog({guest.hypervisor.uri!r}, Path({str(holds(guest.hypervisor))!r}))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program) + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_paused_inside_running_after(domain: Domain, watchdog: Watchdog) -> None:
    """The guest does not run inside the block, runs after it, and the pause is measured."""
    began = time.perf_counter()
    with paused(domain, watchdog) as pause:
        assert domain.state == "paused"
        time.sleep(0.05)
    assert domain.state == "running"
    assert pause.was_running
    assert 50 < pause.ms < (time.perf_counter() - began) * 1000


def test_an_error_inside_resumes(domain: Domain, watchdog: Watchdog) -> None:
    """The error comes through and the guest runs."""
    with pytest.raises(ZeroDivisionError), paused(domain, watchdog):
        raise ZeroDivisionError
    assert domain.state == "running"


def test_an_owners_pause_is_kept(domain: Domain, watchdog: Watchdog) -> None:
    """A guest that its owner paused is still paused afterwards."""
    domain.suspend()
    try:
        with paused(domain, watchdog) as pause:
            pass
        assert not pause.was_running
        assert domain.state == "paused"
    finally:
        domain.resume()


def test_resumed_by_somebody_else_is_an_error(domain: Domain, watchdog: Watchdog) -> None:
    """What was copied while an owner resumed the guest is no picture of one instant."""
    with pytest.raises(PauseFailed), paused(domain, watchdog):
        domain.resume()
    assert domain.state == "running"


def test_resume_is_tried_again(
    domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume that libvirt refuses at first is repeated until the guest runs."""
    real, tries = domain.resume, []

    def stubborn() -> None:
        tries.append(1)
        if len(tries) < 4:
            raise LibvirtFailed("not now")
        real()

    monkeypatch.setattr(domain, "resume", stubborn)
    with paused(domain, watchdog):
        pass
    assert len(tries) == 4
    assert domain.state == "running"


def test_what_we_cannot_resume_the_watchdog_does(
    domain: Domain, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When our own tries are used up the helper takes over."""

    def never() -> None:
        raise LibvirtFailed("not now")

    monkeypatch.setattr(domain, "resume", never)
    monkeypatch.setattr("shared.hypervisor.pause.RESUME_PATIENCE_S", 0.1)
    with pytest.raises(PauseFailed), paused(domain, watchdog):
        pass
    wait_until(lambda: domain.state == "running")


def test_a_killed_workers_guest_runs_within_two_seconds(guest: Guest) -> None:
    """SIGKILL between suspend and resume: the helper resumes, then goes."""

    def killed() -> float:
        process = worker(
            guest,
            """
            with paused(domain, watchdog):
                print(watchdog.pid, flush=True)
                time.sleep(60)
            """,
        )
        assert process.stdout
        helper = int(process.stdout.readline())
        assert guest.state() == "paused"
        process.kill()
        process.wait()
        took = wait_until(lambda: guest.state() == "running")
        wait_until(lambda: is_gone(helper))
        return took

    assert soonest(killed) < PROMISED_S


def test_a_killed_worker_leaves_an_owners_pause(guest: Guest) -> None:
    """A helper with nothing armed leaves a paused guest alone and ends with its worker."""
    process = worker(
        guest,
        """
        watchdog.start()
        domain.suspend()
        print(watchdog.pid, flush=True)
        time.sleep(60)
        """,
    )
    assert process.stdout
    helper = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        wait_until(lambda: is_gone(helper))
        assert guest.state() == "paused"
    finally:
        guest.domain.resume()


def test_a_forked_child_does_not_keep_the_guest_paused(guest: Guest) -> None:
    """A process forked off the worker holds the pipe open; its death is seen all the same."""

    def killed() -> float:
        process = worker(
            guest,
            """
            with paused(domain, watchdog):
                child = os.fork()
                if not child:
                    time.sleep(120)
                    os._exit(0)
                print(child, flush=True)
                time.sleep(60)
            """,
        )
        assert process.stdout
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            return wait_until(lambda: guest.state() == "running")
        finally:
            os.kill(child, signal.SIGKILL)

    assert soonest(killed) < PROMISED_S


def test_a_hung_workers_guest_is_resumed_at_the_deadline(
    domain: Domain, watchdog: Watchdog
) -> None:
    """A worker that lives but hangs loses its hold, and learns that its copy is void."""
    with pytest.raises(PauseFailed), paused(domain, watchdog, deadline_s=0.3):
        wait_until(lambda: domain.state == "running")
    assert domain.state == "running"


def test_arming_costs_less_than_a_millisecond(domain: Domain, watchdog: Watchdog) -> None:
    """The helper's confirmation is not what a pause waits for, where the machine is not busy with
    something else: the fastest tenth counts."""
    times = []
    for _ in range(200):
        started = time.perf_counter()
        arm = watchdog.arm(domain.uuid)
        times.append(time.perf_counter() - started)
        watchdog.disarm(arm)
    assert sorted(times)[20] < 0.001


def test_no_helper_no_pause(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the helper cannot be started the guest is not paused at all."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    suspended: list[int] = []
    monkeypatch.setattr(domain, "suspend", lambda: suspended.append(1))
    with pytest.raises(WatchdogUnavailable), paused(domain, Watchdog(domain.uri, tmp_path)):
        pass
    assert suspended == []


def test_a_dead_helper_is_replaced_with_what_was_armed(guest: Guest, domain: Domain) -> None:
    """A helper that was killed comes back with what it had been told."""
    watchdog = Watchdog(guest.hypervisor.uri, holds(guest.hypervisor))
    try:
        first = watchdog.arm(domain.uuid)
        assert watchdog.pid
        os.kill(watchdog.pid, signal.SIGKILL)
        wait_until(lambda: watchdog.pid is None)
        second = watchdog.arm(domain.uuid, "resume", 60)
        domain.suspend()
        watchdog.fire(first)
        wait_until(lambda: domain.state == "running")
        watchdog.disarm(second)
    finally:
        watchdog.close()


def test_threads_share_one_watchdog(domain: Domain, watchdog: Watchdog) -> None:
    """Answers never get mixed up between threads."""
    failures: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(100):
                with watchdog.armed(domain.uuid) as arm:
                    pass
                assert not arm.fired
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_undo_resumes_once_and_only_what_is_paused(domain: Domain) -> None:
    """Crash recovery resumes a paused guest; on a running or unknown one it does nothing."""
    domain.suspend()
    assert undo.resume_domain(domain.uri, domain.uuid)
    assert not undo.resume_domain(domain.uri, domain.uuid)
    assert not undo.resume_domain(domain.uri, "99999999-aaaa-4bbb-8ccc-dddddddddddd")
    assert domain.state == "running"


def test_undo_waits_for_a_suspend_that_libvirt_is_still_at(guest: Guest, domain: Domain) -> None:
    """Who asked for it is dead, and libvirt says that the guest runs until QEMU has answered."""
    qemu = holder_of(guest.disks[0])
    assert qemu
    os.kill(qemu, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(domain.suspend)
            time.sleep(1)  # nothing tells that it has begun
            undone = pool.submit(undo.resume_domain, domain.uri, domain.uuid)
            time.sleep(1)
            assert not asked.done()
            assert not undone.done()
            os.kill(qemu, signal.SIGCONT)
    finally:
        os.kill(qemu, signal.SIGCONT)
    assert (asked.result(), undone.result()) == (None, True)
    assert domain.state == "running"


def test_undo_looks_again_where_its_resume_had_to_wait(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suspend had waited for the same job, came second, and takes its time."""
    resume, refused = domain.resume, []

    def resumed(self: Domain) -> None:
        if refused:
            resume()
            return
        refused.append(True)
        time.sleep(2 * undo._AT_ONCE_S)
        threading.Timer(3 * undo._AT_ONCE_S, self.suspend).start()
        resume()  # it runs

    monkeypatch.setattr(Domain, "resume", resumed)
    monkeypatch.setattr(undo, "_SUSPEND_S", 30)
    assert undo.resume_domain(domain.uri, domain.uuid)
    assert refused
    assert domain.state == "running"


def test_a_helper_of_the_dead_leaves_a_successors_pause(
    guest: Guest, domain: Domain, watchdog: Watchdog
) -> None:
    """What a living worker holds by then is its own: its copy is not spoilt."""
    process = worker(
        guest, "arm = watchdog.arm(domain.uuid); print('armed', flush=True); time.sleep(60)"
    )
    assert process.stdout
    process.stdout.readline()

    process.kill()
    process.wait()
    with paused(domain, watchdog):
        time.sleep(3)  # it looks at least once a second
        assert guest.state() == "paused"
    assert guest.state() == "running"
