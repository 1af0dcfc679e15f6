"""QEMU's own full copy of a running guest's disks."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from operations.waiting import wait_for

from lab import filesystems
from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from shared.disks import images
from shared.errors import Cancelled
from shared.hypervisor import backup, domains, undo
from shared.hypervisor.backup import push_backup
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.errors import BackupFailed, HypervisorError, LibvirtBusy
from shared.hypervisor.locks import is_open
from shared.hypervisor.memory import memory_saved
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm


def quiet(_done: int, _total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def folder(xfs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A vault folder in the making: QEMU's user may walk in, not list."""
    path = xfs / "vault" / request.node.name
    path.mkdir(parents=True)
    for directory in (path.parent, path):
        directory.chmod(0o711)
    yield path
    shutil.rmtree(path)


def test_both_disks_in_one_job(guest: Guest, domain: Domain, folder: Path) -> None:
    """The copies are whole, private, and hold what the guest had written."""
    guest.write("/data/word", "before the copy")
    targets = {"vda": (folder / "vda.qcow2", "qcow2"), "vdb": (folder / "vdb.raw", "raw")}
    told: list[tuple[int, int]] = []
    push_backup(domain, targets, lambda *p: told.append(p), lambda: False)
    images.check(folder / "vda.qcow2", "qcow2")
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_uid == 0
    assert b"before the copy" in (folder / "vdb.raw").read_bytes()
    assert told[-1][0] == told[-1][1] > 0
    assert not images.info(folder / "vda.qcow2", "qcow2").depends_on
    subprocess.run(["qemu-img", "check", "-q", str(folder / "vda.qcow2")], check=True)


def test_copies_are_whole_only_when_qemu_has_closed_them(domain: Domain, folder: Path) -> None:
    """The job's success comes before the last metadata: every one of many copies is whole."""
    for number in range(8):
        target = folder / f"{number}.qcow2"
        push_backup(domain, {"vda": (target, "qcow2")}, quiet, lambda: False)
        assert not is_open(target)
        images.check(target, "qcow2")


def test_one_disk_alone(domain: Domain, folder: Path) -> None:
    """A disk that is not asked for is not copied."""
    push_backup(domain, {"vdb": (folder / "vdb.raw", "raw")}, quiet, lambda: False)
    assert [path.name for path in folder.iterdir()] == ["vdb.raw"]


@pytest.fixture
def big(hypervisor: Hypervisor, xfs: Path) -> Iterator[Domain]:
    """A running machine with a disk that takes a while to copy."""
    disk = xfs / "big.raw"
    with disk.open("wb") as file:
        for _ in range(300):
            file.write(os.urandom(1 << 20))
    with Guest.create(hypervisor, xfs / "big", disks=[str(disk)]) as made:
        made.start(wait=False)
        yield find_by_name(connect(hypervisor.uri), made.name)
        assert made.state() == "running"


def test_cancel_ends_the_job_and_leaves_nothing(big: Domain, folder: Path) -> None:
    """A cancelled copy leaves no file and no job, soon; the next one works."""
    target = folder / "vda.raw"
    asked: list[float] = []

    def once_begun() -> bool:
        wait_for(lambda: target.stat().st_blocks)
        asked.append(time.monotonic())
        return True

    with pytest.raises(Cancelled):
        push_backup(big, {"vda": (target, "raw")}, quiet, once_begun)
    assert time.monotonic() - asked[-1] < 5
    assert list(folder.iterdir()) == []
    assert not undo.abort_backup(big.uri, big.uuid)
    push_backup(big, {"vda": (target, "raw")}, quiet, lambda: False)


def test_undo_ends_what_a_dead_worker_left(big: Domain, folder: Path) -> None:
    """Crash recovery ends a running copy job, once."""
    target = folder / "vda.raw"
    xml = backup._job_xml(big, {"vda": (target, "raw")})
    ended, deadline = False, time.monotonic() + 90
    while not ended and time.monotonic() < deadline:  # it may be over before it is ended
        target.unlink(missing_ok=True)
        big.call("Copying", lambda handle: handle.backupBegin(xml, None, 0))
        ended = undo.abort_backup(big.uri, big.uuid)
    assert ended
    assert not undo.abort_backup(big.uri, big.uuid)


def test_a_guest_that_stopped_at_a_write_goes_on_when_its_copy_has_failed(
    hypervisor: Hypervisor, folder: Path
) -> None:
    """Where what it is about to overwrite finds no room beside the copy, its write fails too, and
    QEMU stops it. One that had stopped before is let be. Here it is its own disk that has no room,
    for as long as the copy goes on."""
    with filesystems.ext4(512 * filesystems.MIB) as small:
        growing = make_disk(small, "raw", "blank", size=filesystems.GIB)
        growing.chmod(0o666)
        with Guest.create(hypervisor, small / "guest", disks=["qcow2", str(growing)]) as made:
            made.start()
            domain = find_by_name(connect(hypervisor.uri), made.name)
            write = "dd if=/dev/zero of=/dev/vdb bs=1M count=1 seek=$i conv=fsync; i=$((i+1))"
            loop = f"i=0; while :; do {write}; sleep 0.1; done"
            made.agent("guest-exec", path="/bin/sh", arg=["-c", loop])
            ballast: list[Path] = []

            def stop_it() -> None:
                ballast.append(filesystems.fill(small))
                wait_for(lambda: domain.halted_by_io)

            @contextlib.contextmanager
            def instant() -> Iterator[None]:
                yield
                stop_it()

            def check() -> None:
                if ballast:
                    ballast.pop().unlink()
                    raise Cancelled("there is no room")

            targets = {"vda": (folder / "vda.qcow2", "qcow2")}
            with pytest.raises(Cancelled):
                push_backup(domain, targets, quiet, lambda: False, instant=instant(), check=check)
            assert made.state() == "running"

            stop_it()
            assert not undo.abort_backup(domain.uri, domain.uuid)
            assert domain.halted_by_io
            assert undo.go_on(domain.uri, domain.uuid, ballast.pop().unlink)
            assert made.state() == "running"
            assert not undo.go_on(domain.uri, domain.uuid, lambda: pytest.fail("it runs"))


def begin_another(domain: Domain, place: Path) -> None:
    """A backup of its owner's, which goes on until it is ended; in a folder of a short path."""
    place.chmod(0o777)
    xml = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{place}/nbd'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{place}/vda'/></disk>"
        "</disks></domainbackup>"
    )
    domain.call("Copying", lambda handle: handle.backupBegin(xml, None, 0))


def test_anothers_job_is_left_alone(
    domain: Domain, folder: Path, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner's own backup goes on: a copy of ours is refused, and its undo ends only what
    writes into our folder."""
    theirs, ours = folder / "theirs", folder / "ours"
    for each in (theirs, ours):
        each.mkdir(mode=0o711)
    begin_another(domain, theirs)
    monkeypatch.setattr(domains, "OTHERS_JOB_S", 0)

    entered: list[str] = []

    @contextlib.contextmanager
    def instant() -> Iterator[None]:
        entered.append("frozen")
        yield

    targets = {"vdb": (ours / "vdb.raw", "raw")}
    with pytest.raises(LibvirtBusy):
        push_backup(domain, targets, quiet, lambda: False, instant=instant())
    with (
        pytest.raises(LibvirtBusy),
        memory_saved(domain, watchdog, ours / "memory", ["vda"], before=entered.append),
    ):
        pass
    ended = undo.abort_backup(domain.uri, domain.uuid, str(ours))
    going_on = backup.job_files(domain)

    assert entered == []  # nothing is frozen to wait for it, nor journalled that would end it
    assert (ended, going_on) == (False, [theirs / "vda"])
    assert undo.abort_backup(domain.uri, domain.uuid, str(theirs))


def test_a_failure_is_told_and_leaves_nothing(domain: Domain, folder: Path) -> None:
    """Where QEMU cannot write there is an error that says so, and no file."""
    subprocess.run(["chattr", "+i", folder], check=True)  # root may not either
    try:
        with pytest.raises(HypervisorError):
            push_backup(domain, {"vda": (folder / "vda.qcow2", "qcow2")}, quiet, lambda: False)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert list(folder.iterdir()) == []


def test_an_unknown_disk_is_refused(domain: Domain, folder: Path) -> None:
    """A disk that the guest has no more is not silently left out."""
    with pytest.raises(BackupFailed):
        push_backup(domain, {"vdz": (folder / "z", "raw")}, quiet, lambda: False)


def test_no_job_is_not_taken_for_success(
    domain: Domain, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the job's own word that it succeeded, the copy failed."""
    monkeypatch.setattr(backup._Job, "_on_completed", lambda *_: None)
    monkeypatch.setattr(backup._Job, "_completed", lambda _self: {})
    with pytest.raises(BackupFailed):
        push_backup(domain, {"vdb": (folder / "vdb.raw", "raw")}, quiet, lambda: False)
    assert list(folder.iterdir()) == []


def test_the_outcome_is_found_without_the_event(
    domain: Domain, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event lost with libvirtd's restart is made up for by asking."""
    monkeypatch.setattr(backup._Job, "_on_completed", lambda *_: None)
    push_backup(domain, {"vdb": (folder / "vdb.raw", "raw")}, quiet, lambda: False)
    assert (folder / "vdb.raw").exists()


def test_a_job_that_libvirt_has_run_on_for_ever_is_ended(
    domain: Domain, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What libvirt 9.0 answers where QEMU ended the copy while libvirtd was away: no disk in it."""
    ask, end = libvirt.virDomain.jobStats, libvirt.virDomain.abortJob
    ended: list[object] = []

    def stuck(handle: libvirt.virDomain, flags: int = 0) -> dict[str, object]:
        if flags or ended or not (folder / "b").exists():
            return dict(ask(handle, flags))
        return {"type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "operation": 9, "time_elapsed": 981}

    def abort(handle: libvirt.virDomain, *flags: int) -> object:
        ended.append(handle)
        with contextlib.suppress(libvirt.libvirtError):  # of QEMU's own job nothing is left
            end(handle, *flags)
        return 0

    monkeypatch.setattr(backup, "_EMPTY_PATIENCE_S", 1.0)
    monkeypatch.setattr(backup._Job, "_on_completed", lambda *_: None)
    monkeypatch.setattr(libvirt.virDomain, "jobStats", stuck)
    monkeypatch.setattr(libvirt.virDomain, "abortJob", abort)
    soon = time.monotonic() + 60
    with pytest.raises(BackupFailed, match="lost track"):
        push_backup(domain, {"vdb": (folder / "b", "raw")}, quiet, lambda: time.monotonic() > soon)
    assert ended
    assert list(folder.iterdir()) == []


def test_a_job_that_runs_is_somebody_elses(domain: Domain, folder: Path) -> None:
    """A second copy at the same time is refused and the first one is not disturbed."""
    outcome: list[BaseException | None] = []
    started, go_on = threading.Event(), threading.Event()

    def hold() -> bool:
        started.set()
        go_on.wait(30)
        return False

    def first() -> None:
        try:
            push_backup(domain, {"vda": (folder / "a.qcow2", "qcow2")}, quiet, hold)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    started.wait(30)
    try:
        push_backup(domain, {"vdb": (folder / "b.raw", "raw")}, quiet, lambda: False)
        refused = False
    except HypervisorError:
        refused = True
    go_on.set()
    thread.join()
    assert outcome == [None]
    assert (folder / "a.qcow2").exists()
    assert (folder / "b.raw").exists() != refused


def test_undo_of_no_backup_does_nothing(domain: Domain) -> None:
    """Crash recovery where no copy job runs leaves everything alone."""
    assert not undo.abort_backup(domain.uri, domain.uuid)
