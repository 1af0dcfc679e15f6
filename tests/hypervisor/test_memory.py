"""A guest's memory and its disks at one instant, and the guest itself unharmed by it."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest
from lxml import etree
from test_engine import MOMENT_MS, busy
from test_pause import PROMISED_S, soonest, wait_until, worker

from lab import filesystems
from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from shared.disks import engine
from shared.disks.engine import capture
from shared.disks.errors import InsufficientSpace
from shared.errors import Cancelled
from shared.hypervisor import backup, memory, undo, watchdog_helper
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.errors import (
    HypervisorError,
    MemoryNeedsReflink,
    MemoryNotCloneable,
    MemoryNotSaved,
    MemoryNotUsable,
    PauseFailed,
    ServerNotRunning,
)
from shared.hypervisor.hot import refuse_elsewhere
from shared.hypervisor.memory import (
    definition_in,
    memory_saved,
    refuse_other_name,
    resume_from,
)
from shared.hypervisor.pause import DEADLINE_S
from shared.hypervisor.saving import is_stilled, note_of, saving, still, wake
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm
COUNT = (
    "i=$((i+1)); echo $i > /dev/shm/next; mv /dev/shm/next /dev/shm/count; printf %08d $i | "
    "dd of=/dev/vdb bs=8 seek=1 conv=notrunc,fsync 2>/dev/null"
)
"""Counts in memory first, then on the disk."""


def _count(guest: Guest) -> int:
    return int(guest.read("/dev/shm/count"))  # noqa: S108


@pytest.fixture
def saved(workspace: Path) -> Iterator[Path]:
    """Where the memory goes: a folder that libvirt can enter."""
    workspace.chmod(0o711)
    yield workspace / "memory.save"


def test_memory_and_disks_are_one_instant(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, folder: Path
) -> None:
    """A guest that counts in memory and on its disk goes on counting from there, and the disk
    is never ahead of the memory nor more than one behind."""
    with Guest.create(hypervisor, xfs / "counting", disks=["qcow2", "raw"]) as guest:
        guest.start().wait_ready()
        guest.run("mkdir -p /dev/shm; mount -t tmpfs none /dev/shm; umount /data")
        domain = find_by_name(connect(hypervisor.uri), guest.name)
        with busy(guest, COUNT):
            taken = capture(domain, folder, watchdog=watchdog, memory=True)
            assert guest.state() == "running"
        assert (taken.way, taken.consistency) == ("reflink", "crash")
        assert 0 < taken.pause_ms < MOMENT_MS
        print(f"paused {taken.pause_ms:.0f} ms")
        assert taken.memory
        assert taken.memory.stat().st_mode & 0o777 == 0o600

        guest.destroy()
        for disk, file in zip(guest.disks, taken.files, strict=True):
            disk.write_bytes(file.path.read_bytes())
        on_disk = int(guest.disks[1].read_bytes()[8:16])
        resume_from(domain, taken.memory)

        assert not domain.was_booted
        guest.wait_ready()  # libvirt hears of its agent a moment later
        first = _count(guest)
        assert 0 < on_disk <= first
        wait_until(lambda: _count(guest) > first)
        guest.run("touch /tmp/stop")


def _cancel() -> None:
    raise Cancelled("The copy was cancelled.")


def test_memory_that_somebody_has_frozen_is_refused(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """Whoever wakes from it would be frozen, and nobody would thaw that one."""
    guest.agent("guest-fsfreeze-freeze")
    try:
        with (
            pytest.raises(MemoryNotSaved, match="domfsthaw"),
            memory_saved(domain, watchdog, folder / "memory.save", ["vda"]),
        ):
            pass
        assert guest.state() == "running"
        assert guest.agent("guest-fsfreeze-status") == "frozen"
    finally:
        guest.agent("guest-fsfreeze-thaw")


def test_a_cancelled_save_leaves_the_guest_running(
    guest: Guest, domain: Domain, watchdog: Watchdog, saved: Path
) -> None:
    """The save is ended, the guest runs, and it can be saved the next time."""
    with (
        pytest.raises(Cancelled),
        memory_saved(domain, watchdog, saved, ["vda", "vdb"], check=_cancel),
    ):
        pytest.fail("it was cancelled")
    assert guest.state() == "running"

    with memory_saved(domain, watchdog, saved, ["vda", "vdb"]):
        assert guest.state() == "paused"
    assert guest.state() == "running"


def _is_saving(domain: Domain) -> bool:
    return saving(domain.call("Looking at", lambda handle: handle.jobStats()))


def _save(domain: Domain, saved: Path) -> None:
    """As a worker that has died since had libvirt do it."""
    xml = memory._description(domain, saved, ["vda", "vdb"])
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    with contextlib.suppress(HypervisorError):
        domain.call("Saving", lambda handle: handle.snapshotCreateXML(xml, flags))


def _cancelled_by_worker(
    domain: Domain, watchdog: Watchdog, saved: Path, deadline_s: float = DEADLINE_S
) -> None:
    def check() -> None:
        if _is_saving(domain):
            raise Cancelled("now")

    disks = ["vda", "vdb"]
    save = memory_saved(domain, watchdog, saved, disks, check=check, deadline_s=deadline_s)
    saved.unlink(missing_ok=True)
    with contextlib.suppress(Cancelled), save:
        pass


def _cancelled_by_another(domain: Domain, saved: Path, release: Callable[[], object]) -> None:
    thread = threading.Thread(target=_save, args=(domain, saved))
    thread.start()
    while thread.is_alive() and not _is_saving(domain):
        time.sleep(0.005)
    release()
    thread.join()


@pytest.mark.parametrize("by", ["worker", "journal", "helper"])
@pytest.mark.parametrize("full", [False, True], ids=["noted", "no room for a note"])
def test_a_save_is_cancelled_of_a_held_guest_alone(
    guest: Guest,
    domain: Domain,
    watchdog: Watchdog,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    full: bool,
) -> None:
    """QEMU may go on with inactive images else, and die of the next write."""
    states: list[int] = []
    abort = libvirt.virDomain.abortJob

    def noted(handle: libvirt.virDomain, *given: int) -> object:
        states.append(handle.state()[0])
        return abort(handle, *given)

    monkeypatch.setattr(libvirt.virDomain, "abortJob", noted)
    monkeypatch.setattr(memory, "_POLL_S", 0.005)
    if full:
        monkeypatch.setattr(Path, "touch", lambda path: (path / "none").mkdir())
    guest.run("dd if=/dev/urandom of=/dev/shm/noise bs=1M count=64 2>/dev/null")
    given = domain.uri, domain.uuid
    releases: dict[str, Callable[[], object]] = {
        "journal": lambda: undo.release_memory(*given, watchdog.holds),
        "helper": lambda: watchdog_helper.give_back(*given, "release", watchdog.holds, 0.0),
    }
    deadline = time.monotonic() + 90
    while not states and time.monotonic() < deadline:  # a save may end before it is cancelled
        if by == "worker":
            _cancelled_by_worker(domain, watchdog, saved)
        else:
            saved.unlink(missing_ok=True)
            _cancelled_by_another(domain, saved, releases[by])
            releases["journal"]()

    assert set(states) == {libvirt.VIR_DOMAIN_PAUSED}
    assert guest.state() == "running"
    assert not is_stilled(note_of(watchdog.holds, domain.uuid))
    guest.write("/data/after", "written")
    with memory_saved(domain, watchdog, saved, ["vda", "vdb"]):
        pass
    guest.run("rm /dev/shm/noise")


def test_libvirt_starts_again_during_a_save(
    guest: Guest, domain: Domain, watchdog: Watchdog, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it cancels the save itself, of a guest that nobody holds. Before that one is saved once
    more its images are made active; but not while there is a job, in which nobody is resumed."""
    called: list[str] = []
    names = ["suspend", "resume", "snapshotCreateXML"]
    for name in names:
        real = getattr(libvirt.virDomain, name)

        def noted(
            handle: libvirt.virDomain, *given: Any, name: str = name, real: Any = real
        ) -> Any:
            called.append(name)
            if name == "snapshotCreateXML" and called.count(name) == 1:
                lost = libvirt.libvirtError("client socket is closed")
                lost.err = (libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_RPC, "client socket is closed")
                raise lost
            return real(handle, *given)

        monkeypatch.setattr(libvirt.virDomain, name, noted)
    with memory_saved(domain, watchdog, saved, ["vda", "vdb"]):
        pass
    assert called == ["snapshotCreateXML", *names, "resume"]
    assert not is_stilled(note_of(watchdog.holds, domain.uuid))
    called.clear()
    monkeypatch.setattr(libvirt.virDomain, "jobStats", lambda *_given: {"type": 2})
    domain.call("Waking", lambda handle: wake(handle, note_of(watchdog.holds, domain.uuid)))
    assert called == []


def test_waking_that_was_broken_off_is_ended(
    guest: Guest, domain: Domain, watchdog: Watchdog
) -> None:
    """As by a libvirt that starts again between pause and resume; an owner's pause stays."""
    note = note_of(watchdog.holds, domain.uuid)
    domain.call("Pausing", lambda handle: still(handle, note))
    domain.call("Waking", lambda handle: wake(handle, note))
    assert guest.state() == "running"
    domain.suspend()
    domain.call("Waking", lambda handle: wake(handle, note))
    assert guest.state() == "paused"
    domain.resume()


def test_a_pause_that_comes_late_is_ended_too(
    guest: Guest, domain: Domain, watchdog: Watchdog
) -> None:
    """Of a worker that died: it had noted it, and sent it, and it ran when it was looked at."""
    note = note_of(watchdog.holds, domain.uuid)
    note.touch()
    given = domain.uri, domain.uuid
    assert not undo.release_memory(*given, watchdog.holds)
    domain.suspend()
    assert watchdog_helper.give_back(*given, "release", watchdog.holds)
    assert guest.state() == "running"


@pytest.mark.parametrize("stilled", [True, False], ids=["ours", "its owner's"])
def test_whoever_comes_next_knows_whose_pause_it_is(
    domain: Domain, watchdog: Watchdog, stilled: bool
) -> None:
    """Of one that died between the pause and the end of the save a note is left."""
    note = note_of(watchdog.holds, domain.uuid)
    if stilled:
        note.touch()
    domain.suspend()
    resumed = undo.release_memory(domain.uri, domain.uuid, watchdog.holds)
    state = domain.state
    if state == "paused":
        domain.resume()
    assert (resumed, state) == ((True, "running") if stilled else (False, "paused"))
    assert not note.exists()


def test_a_guest_that_stopped_at_a_write_goes_on_when_its_copy_has_failed(
    hypervisor: Hypervisor, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disks are where its memory is saved: where that is full QEMU stops it. The save is ended
    all the same. Here the room comes back with the copy's end, and not before."""
    with filesystems.xfs(filesystems.GIB) as small:
        vault = small / "vault"
        vault.mkdir(mode=0o711)
        growing = make_disk(small, "raw", "blank", size=filesystems.GIB)
        growing.chmod(0o666)
        with Guest.create(hypervisor, small / "guest", disks=["qcow2", str(growing)]) as made:
            made.start().wait_ready()
            made.run("mkdir -p /dev/shm; mount -t tmpfs none /dev/shm")
            made.run("dd if=/dev/urandom of=/dev/shm/noise bs=1M count=64 2>/dev/null")
            write = "dd if=/dev/zero of=/dev/vdb bs=1M count=1 seek=$i conv=fsync; i=$((i+1))"
            loop = f"i=0; while :; do {write}; sleep 0.1; done"
            made.agent("guest-exec", path="/bin/sh", arg=["-c", loop])
            domain = find_by_name(connect(hypervisor.uri), made.name)
            ballast: list[Path] = []

            def full() -> bool:
                if not ballast and not _is_saving(domain):
                    return False
                deadline = time.monotonic() + 60
                while not domain.halted_by_io and time.monotonic() < deadline:
                    ballast[:] = [filesystems.fill(small)]  # also what libvirt gives back
                    time.sleep(0.3)
                return True

            def go_on(domain: Domain) -> bool:
                assert domain.halted_by_io
                ballast[0].unlink()
                return backup.go_on(domain)

            monkeypatch.setattr(engine, "go_on", go_on)
            monkeypatch.setattr(memory, "_POLL_S", 0.005)
            copy = partial(capture, domain, watchdog=watchdog, memory=True, free_floor=0.0)
            deadline = time.monotonic() + 90
            while not ballast and time.monotonic() < deadline:  # a save may end before it is seen
                place = Path(tempfile.mkdtemp(dir=vault))
                place.chmod(0o711)
                with contextlib.suppress(Cancelled, InsufficientSpace):
                    copy(place, cancelled=full)
            assert ballast
            assert made.state() == "running"
            assert list(place.iterdir()) == []


def test_a_guest_that_writes_too_fast_is_paused_for_it(
    guest: Guest, domain: Domain, watchdog: Watchdog, saved: Path
) -> None:
    """Once as much is written as it has RAM the guest is held, so that the save ends."""
    with memory_saved(domain, watchdog, saved, ["vda", "vdb"], most_bytes=0) as pause:
        assert guest.state() == "paused"
    assert pause.ms > 0


def test_memory_of_a_paused_guest_is_refused(
    domain: Domain, watchdog: Watchdog, saved: Path
) -> None:
    """QEMU would hold its images inactive for as long as its owner has it paused."""
    domain.suspend()
    try:
        with (
            pytest.raises(ServerNotRunning, match="resume it"),
            memory_saved(domain, watchdog, saved, ["vda", "vdb"]),
        ):
            pytest.fail("it was refused")
        assert domain.state == "paused"
    finally:
        domain.resume()


def test_a_pause_that_its_owner_asks_for_meanwhile_stays(
    domain: Domain, watchdog: Watchdog, saved: Path
) -> None:
    """It is not taken for ours, and the copy is not kept."""
    try:
        with (
            pytest.raises(PauseFailed, match="as they left it"),
            memory_saved(
                domain, watchdog, saved, ["vda", "vdb"], before=lambda _: domain.suspend()
            ),
        ):
            pass
        assert domain.paused_by_user
    finally:
        domain.resume()


@pytest.mark.parametrize("then", ["it ends", "it is cancelled", "the worker dies"])
def test_a_pause_that_its_owner_asks_for_during_the_save_stays(
    domain: Domain,
    watchdog: Watchdog,
    saved: Path,
    then: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """libvirt has a reason of its own for it while it saves."""

    def check() -> None:
        if domain.state != "running" or not saved.exists() or not saved.stat().st_size:
            return
        domain.suspend()
        if not domain.paused_by_user:
            return  # too late: it was paused by the save already, and the suspend did nothing
        if then == "the worker dies":
            undo.release_memory(domain.uri, domain.uuid, watchdog.holds)
        if then != "it ends":
            raise Cancelled("now")

    def saving() -> Exception | None:
        try:
            with memory_saved(domain, watchdog, saved, ["vda", "vdb"], check=check):
                return None
        except (PauseFailed, Cancelled) as error:
            return error

    monkeypatch.setattr(memory, "_POLL_S", 0.005)
    ended, deadline = None, time.monotonic() + 90
    while ended is None and time.monotonic() < deadline:
        ended = saving()
    stays = domain.paused_by_user
    if domain.state == "paused":
        domain.resume()
    assert type(ended) is (PauseFailed if then == "it ends" else Cancelled)
    assert stays, ended


@pytest.mark.parametrize("most_bytes", [None, 0])
def test_a_hung_workers_guest_is_resumed_at_the_deadline(
    domain: Domain, watchdog: Watchdog, saved: Path, most_bytes: int | None
) -> None:
    """The worker lives and loses its hold, and learns that its copy is void; also of a guest that
    was paused for the save."""
    held = memory_saved(
        domain, watchdog, saved, ["vda", "vdb"], deadline_s=0.5, most_bytes=most_bytes
    )
    with pytest.raises(PauseFailed, match="paused or resumed by somebody else"), held:
        wait_until(lambda: domain.state == "running")


def test_an_error_while_saving_leaves_the_guest_running(
    guest: Guest, domain: Domain, watchdog: Watchdog, workspace: Path
) -> None:
    """Where libvirt cannot write the file the error says so, and the guest runs."""
    nowhere = workspace / "no such folder" / "memory"
    with (
        pytest.raises(MemoryNotSaved, match="without memory"),
        memory_saved(domain, watchdog, nowhere, ["vda", "vdb"]),
    ):
        pytest.fail("there is nowhere to save it")
    assert guest.state() == "running"


@pytest.mark.parametrize("when", ["saving", "held"])
def test_a_dead_workers_guest_runs_within_two_seconds(
    guest: Guest, domain: Domain, saved: Path, when: str
) -> None:
    """SIGKILL while the memory is being saved, and while the guest is held after it."""
    body = f"""
        from pathlib import Path
        from shared import faults
        from shared.hypervisor.memory import memory_saved
        def point(name):
            if name == "memory:saving" and {when == "saving"}:
                print("now", flush=True); time.sleep(60)
        faults.point = point
        with memory_saved(domain, watchdog, Path({str(saved)!r}), ["vda", "vdb"]):
            print("now", flush=True); time.sleep(60)
    """

    def killed() -> float:
        saved.unlink(missing_ok=True)
        process = worker(guest, body)
        assert process.stdout
        assert process.stdout.readline() == "now\n"
        if when == "held":
            assert guest.state() == "paused"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        return wait_until(lambda: not _saving(domain) and domain.state == "running")

    assert soonest(killed) < PROMISED_S


def _saving(domain: Domain) -> bool:
    return bool(domain.call("asking", lambda handle: handle.jobStats()).get("type"))


def test_the_journal_gives_the_guest_back_too(
    guest: Guest, domain: Domain, watchdog: Watchdog, saved: Path
) -> None:
    """What a successor does for a worker whose watchdog died with it; twice does no harm."""
    with (
        pytest.raises(PauseFailed, match="paused or resumed by somebody else"),
        memory_saved(domain, watchdog, saved, ["vda", "vdb"]),
    ):
        assert undo.release_memory(domain.uri, domain.uuid, watchdog.holds)
        assert guest.state() == "running"
    assert not undo.release_memory(domain.uri, domain.uuid, watchdog.holds)


def test_of_a_failed_copy_it_is_told_that_the_guest_is_given_back(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """So that a pause that its owner asks for from then on is not undone."""
    steps: list[str] = []
    with pytest.raises(Cancelled):
        capture(
            domain,
            folder,
            watchdog=watchdog,
            memory=True,
            cancelled=lambda: "memory" in steps,
            before=steps.append,
        )
    assert steps == ["memory", "resumed"]
    assert guest.state() == "running"


def test_a_worker_that_hangs_while_it_ends_a_save_keeps_no_guest(
    guest: Guest, domain: Domain, watchdog: Watchdog, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has paused the guest for it; the watchdog ends the save and gives the guest back."""
    took: list[float] = []
    armed: list[str] = []

    def hang(handle: Any, note: Path) -> None:
        if not took:
            armed.extend(watchdog._armed.values())  # the save's own end has a deadline as well
            still(handle, note)
            took.append(wait_until(lambda: domain.state == "running", 10))

    guest.run("dd if=/dev/urandom of=/dev/shm/noise bs=1M count=64 2>/dev/null")
    monkeypatch.setattr(memory, "end_save", hang)
    monkeypatch.setattr(memory, "_POLL_S", 0.005)

    deadline = time.monotonic() + 90
    while not took and time.monotonic() < deadline:  # a save may end before it is cancelled
        _cancelled_by_worker(domain, watchdog, saved, deadline_s=1.0)
    assert 0 < took[0] < 10
    assert any(line.endswith("release 1.0") for line in armed)
    guest.run("rm /dev/shm/noise")


def test_memory_that_this_host_cannot_run_is_not_cloned(domain: Domain) -> None:
    """QEMU drops machine types, and a host may lose a feature of its CPU by an update."""
    running = domain.live_definition()
    root = etree.fromstring(running)
    machine = root.find("os/type").attrib["machine"]  # type: ignore[union-attr]
    cpu = "<cpu mode='custom' match='exact'><model>EPYC-Milan</model></cpu>"
    assert refuse_elsewhere(domain.uri, running) is None  # type: ignore[func-returns-value]
    with pytest.raises(MemoryNotCloneable, match="machine"):
        refuse_elsewhere(domain.uri, running.replace(machine, "pc-q35-0.1"))
    root.replace(root.find("cpu"), etree.fromstring(cpu))  # type: ignore[arg-type]
    with pytest.raises(MemoryNotCloneable, match="CPU"):
        refuse_elsewhere(domain.uri, etree.tostring(root, encoding="unicode"))
    root.find("cpu").set("check", "none")  # type: ignore[union-attr]  which QEMU starts with less
    refuse_elsewhere(domain.uri, etree.tostring(root, encoding="unicode"))


def test_a_stopped_server_has_no_memory(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, saved: Path
) -> None:
    """It is said, and nothing is copied."""
    with Guest.create(hypervisor, xfs / "off-memory", disks=["qcow2"]) as made:
        domain = find_by_name(connect(hypervisor.uri), made.name)
        with pytest.raises(ServerNotRunning):
            capture(domain, saved.parent, watchdog=watchdog, memory=True)
    assert list(saved.parent.iterdir()) == []


def test_memory_needs_disks_that_can_be_shared(
    guest: Guest, domain: Domain, watchdog: Watchdog, saved: Path
) -> None:
    """Where they would be streamed it is refused, and nothing is touched."""
    with pytest.raises(MemoryNeedsReflink, match="share no file system"):
        capture(domain, saved.parent, watchdog=watchdog, memory=True)
    assert list(saved.parent.iterdir()) == []


def test_memory_of_another_name_is_refused(domain: Domain, watchdog: Watchdog, saved: Path) -> None:
    """libvirt would refuse it after the disks had been exchanged."""
    with memory_saved(domain, watchdog, saved, ["vda", "vdb"]):
        pass
    definition = definition_in(domain.uri, saved)
    refuse_other_name(definition, domain.name)
    with pytest.raises(MemoryNotUsable, match="virsh domrename"):
        refuse_other_name(definition, "another")
