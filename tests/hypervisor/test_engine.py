"""The copy engine on real guests: one instant, nothing lost, nothing left behind."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from operations.waiting import wait_for
from test_backup import begin_another

from lab import offline
from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor
from shared import faults
from shared.disks import catching_up, engine, images, planning
from shared.disks.copied import CopiedDisk
from shared.disks.copy import stream_copy
from shared.disks.engine import capture
from shared.disks.errors import CopyFailed, InsufficientSpace, PauseTooLong, ServerChanged
from shared.disks.extents import extent_count
from shared.disks.materialise import materialise
from shared.disks.planning import plan
from shared.errors import Cancelled
from shared.hypervisor import domains, memory, undo
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain, find_by_name
from shared.hypervisor.errors import DiskLost, DiskNotCopyable, LibvirtBusy, QuiesceFailed
from shared.hypervisor.memory import memory_saved
from shared.hypervisor.saving import saving
from shared.hypervisor.watchdog import Watchdog
from shared.manifest import Manifest, ManifestDisk, ManifestServer, read_manifest
from shared.vault import Vault

pytestmark = pytest.mark.vm
MOMENT_MS = 5000
"""More than a guest is ever held, on a machine that is busy with something else too. How long it
is where nothing else goes on, `bench/` measures."""


@pytest.fixture
def elsewhere(workspace: Path) -> Path:
    """A vault folder on another file system, to which no extents can be shared."""
    path = workspace / "copies"
    path.mkdir()
    path.chmod(0o711)
    return path


@pytest.fixture
def stopped(hypervisor: Hypervisor, xfs: Path) -> Iterator[Domain]:
    """A server that is off."""
    with Guest.create(hypervisor, xfs / "off", disks=["qcow2"]) as made:
        yield find_by_name(connect(hypervisor.uri), made.name)


@contextlib.contextmanager
def busy(guest: Guest, command: str) -> Iterator[None]:
    """Have the guest repeat `command` until the block is left; it has done it once before."""
    guest.run("rm -f /tmp/stop /tmp/begun")
    loop = f"while [ ! -e /tmp/stop ]; do {command}; : >/tmp/begun; done"
    started = guest.agent("guest-exec", path="/bin/sh", arg=["-c", loop])
    wait_for(lambda: guest.run("test -e /tmp/begun")[0] == 0)
    try:
        yield
    finally:
        guest.run("touch /tmp/stop")
        while not guest.agent("guest-exec-status", pid=started["pid"])["exited"]:
            time.sleep(0.05)


def as_raw(disk: Path) -> Path:
    """A streamed disk: of a thin raw one of a running guest it is a qcow2."""
    raw = disk.with_suffix(".raw")
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw)]
    subprocess.run(command, check=True)
    return raw


def complaints(raw_disk: Path) -> str:
    """What e2fsck finds wrong with a file system once its journal is replayed; "" if nothing."""
    replay = subprocess.run(["e2fsck", "-p", str(raw_disk)], capture_output=True, text=True)
    check = subprocess.run(["e2fsck", "-fn", str(raw_disk)], capture_output=True, text=True)
    return f"{replay.stdout}{check.stdout}" if check.returncode or replay.returncode > 1 else ""


def test_reflink_under_a_writer(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """A copy of a busy guest is whole and clean, and it paused for a moment only."""
    steps: list[str] = []
    with busy(guest, "dd if=/dev/urandom of=/data/w bs=64k count=64 conv=fsync 2>/dev/null"):
        taken = capture(domain, folder, watchdog=watchdog, quiesce="never", before=steps.append)
    assert (taken.way, taken.consistency) == ("reflink", "crash")
    assert 0 < taken.pause_ms < MOMENT_MS
    print(f"paused {taken.pause_ms:.1f} ms")
    assert steps == ["pause", "released"]
    assert [(f.target, f.format, f.path.name) for f in taken.files] == [
        ("vda", "qcow2", "vda.qcow2"),
        ("vdb", "raw", "vdb.raw"),
    ]
    assert complaints(folder / "vdb.raw") == ""
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


def test_a_quiesced_copy_holds_all_that_was_written(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """With the agent the copy is file-system consistent: no journal is left to replay."""
    guest.run("echo unsynced > /data/last")
    taken = capture(domain, folder, watchdog=watchdog, quiesce="require")
    assert taken.consistency == "file-system"
    assert b"unsynced" in (folder / "vdb.raw").read_bytes()
    assert guest.agent("guest-fsfreeze-status") == "thawed"


def test_both_disks_are_one_instant(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """A counter written first to one disk and then to the other never runs ahead."""
    count = (
        "i=$((i+1)); for disk in vda vdb; do printf %08d $i | "
        "dd of=/dev/$disk bs=8 seek=1 conv=notrunc,fsync 2>/dev/null; done"
    )
    seen = []
    with busy(guest, count):
        for number in range(5):
            place = folder / str(number)
            place.mkdir()
            capture(domain, place, watchdog=watchdog, quiesce="never")
            stream_copy(
                place / "vda.qcow2", place / "vda.raw", "qcow2", "raw", lambda *_: None, bool
            )
            first, second = (
                int((place / name).read_bytes()[8:16]) for name in ("vda.raw", "vdb.raw")
            )
            assert 0 <= first - second <= 1
            seen.append(first)
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]


def test_stream_copies_a_running_guest(
    guest: Guest, domain: Domain, watchdog: Watchdog, elsewhere: Path
) -> None:
    """Where no extents can be shared QEMU copies, without pausing the guest."""
    guest.write("/data/stream", "streamed")
    steps: list[str] = []
    taken = capture(domain, elsewhere, watchdog=watchdog, before=steps.append)
    assert (taken.way, taken.consistency, taken.pause_ms) == ("stream", "file-system", 0.0)
    assert steps == ["backup", "thawed", "released"]
    raw = as_raw(elsewhere / "vdb.qcow2")
    assert b"streamed" in raw.read_bytes()
    assert complaints(raw) == ""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_stream_of_a_thin_disk_is_as_thin(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, elsewhere: Path, state: str
) -> None:
    """A raw one of which next to nothing is written; nor is room asked for all of it, also to
    write it out again."""
    disk = make_disk(xfs, "raw", "blank", size=1 << 36, name=f"thin-{state}.raw")
    with Guest.create(hypervisor, xfs / f"thin-{state}", disks=["qcow2", str(disk)]) as made:
        if state == "running":
            made.start()
            made.run("printf thin | dd of=/dev/vdb bs=4 seek=1000000 conv=notrunc,fsync")
        else:
            with disk.open("r+b") as file:
                file.seek(4_000_000)
                file.write(b"thin")
        domain = find_by_name(connect(hypervisor.uri), made.name)
        taken = capture(domain, elsewhere, watchdog=watchdog, way="stream")
    copy = taken.files[1]
    assert (copy.format, copy.virtual_bytes) == ("qcow2" if state == "running" else "raw", 1 << 36)
    assert copy.bytes < 1 << 25
    written = elsewhere / "again"
    materialise([copy], {"vdb": written}, formats={"vdb": "raw"})
    with written.open("rb") as file:
        file.seek(4_000_000)
        assert file.read(4) == b"thin"
    assert written.stat().st_blocks * 512 < 1 << 20


def test_room_is_asked_for_all_that_is_written(
    hypervisor: Hypervisor, xfs: Path, elsewhere: Path
) -> None:
    """QEMU writes what reads as holes to a raw copy, so a disk that was allocated ahead becomes a
    qcow2, and one with few holes takes its whole length."""
    ahead = make_disk(xfs, "raw", "blank", size=1 << 28, name="ahead.raw")
    with ahead.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 28)
    full = make_disk(xfs, "raw", "blank", size=1 << 26, name="full.raw")
    full.write_bytes(os.urandom(61 << 20))
    os.truncate(full, 1 << 26)
    disks = [str(ahead), str(full)]
    with Guest.create(hypervisor, xfs / "ahead", disks=["qcow2", *disks]) as made:
        made.start()
        domain = find_by_name(connect(hypervisor.uri), made.name)
        _, thin, thick = plan(domain, elsewhere, way="stream").sources
        made.destroy()
        _, _, stopped = plan(domain, elsewhere, way="stream").sources
    assert (thin.copy_format, thin.needed_bytes < 1 << 25) == ("qcow2", True)
    assert (thick.copy_format, thick.needed_bytes) == ("raw", 1 << 26)
    assert stopped.copy_format == "raw"
    assert stopped.needed_bytes < 1 << 26


@pytest.mark.parametrize("way", ["reflink", "stream"])
def test_a_stopped_server(
    stopped: Domain, watchdog: Watchdog, folder: Path, way: engine.Choice
) -> None:
    """A stopped server is copied without being started, byte for byte the same disk."""
    taken = capture(stopped, folder, watchdog=watchdog, way=way)
    assert (taken.way, taken.pause_ms) == (way, 0.0)
    source = DomainDefinition.parse(stopped.definition()).disks[0].path
    command = ["qemu-img", "compare", "-q", str(source), str(folder / "vda.qcow2")]
    assert subprocess.run(command).returncode == 0
    assert stopped.state == "stopped"


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_streams_are_compressed(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, folder: Path, state: str
) -> None:
    """With zstd, raw disks too, of any server: the same bytes in less room, in whole files."""
    with Guest.create(hypervisor, xfs / f"zstd-{state}", disks=["qcow2", "raw"]) as made:
        domain = find_by_name(connect(hypervisor.uri), made.name)
        with made.disks[1].open("r+b") as disk:
            disk.seek(16 << 20)
            disk.write(b"to be compressed" * (1 << 18))
        if state != "stopped":
            made.start()
            domain.suspend()  # so that it can be compared
        taken = capture(domain, folder, watchdog=watchdog, way="stream", compress=True)
        assert [(file.target, file.format) for file in taken.files] == [
            ("vda", "qcow2"),
            ("vdb", "qcow2"),
        ]
        about = ["qemu-img", "info", "-U", str(taken.files[1].path)]
        assert "compression type: zstd" in subprocess.check_output(about, text=True)
        assert taken.files[1].bytes < 4 << 20
        assert sorted(path.name for path in folder.iterdir()) == ["vda.qcow2", "vdb.qcow2"]
        command = ["qemu-img", "compare", "-U", "-q", "-f", "raw", "-F", "qcow2"]
        command += [str(made.disks[1]), str(taken.files[1].path)]
        assert subprocess.run(command).returncode == 0


def test_an_error_after_a_copy_was_compressed_leaves_none(
    domain: Domain, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the compressed one nor what it was made of; the guest runs on."""

    def point(name: str) -> None:
        if name == "stream:compressed":
            raise OSError("a mishap")

    monkeypatch.setattr(faults, "point", point)
    with pytest.raises(OSError, match="a mishap"):
        capture(domain, folder, watchdog=watchdog, way="stream", compress=True)
    assert list(folder.iterdir()) == []
    assert domain.state == "running"


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_lazy_refcounts(
    hypervisor: Hypervisor, xfs: Path, watchdog: Watchdog, folder: Path, state: str
) -> None:
    """A disk whose clusters QEMU counts only when it closes it is copied whole: of a guest that
    runs, and of one whose QEMU was killed."""
    with Guest.create(hypervisor, xfs / f"lazy-{state}", disks=["qcow2"]) as made:
        (disk,) = made.disks
        amend = ["qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", str(disk)]
        subprocess.run(amend, check=True)
        if state == "running":
            made.start().run("dd if=/dev/urandom of=/root/lazy bs=64k count=64 conv=fsync")
        else:
            killed = ["qemu-io", "-c", "write -P 7 100M 4M", "-c", "flush", "-c", "sigraise 9"]
            assert subprocess.run([*killed, str(disk)], capture_output=True).returncode
        domain = find_by_name(connect(hypervisor.uri), made.name)
        taken = capture(domain, folder, watchdog=watchdog)
        assert taken.way == "reflink"
        images.check_by_qemu(folder / "vda.qcow2", "qcow2")
        if state == "stopped":
            compare = ["qemu-img", "compare", "-q", str(disk), str(folder / "vda.qcow2")]
            assert subprocess.run(compare).returncode == 0


@pytest.mark.parametrize("way", ["reflink", "stream"])
def test_an_owners_pause_is_copied_and_kept(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path, way: engine.Choice
) -> None:
    """A guest that its owner paused is copied as it is and stays paused."""
    domain.suspend()
    try:
        taken = capture(domain, folder, watchdog=watchdog, way=way)
        assert taken.consistency_reason == "the guest was paused by its owner"
        assert domain.state == "paused"
    finally:
        domain.resume()


def test_a_server_that_went_off_and_starts_meanwhile_is_not_copied(
    guest: Guest,
    domain: Domain,
    watchdog: Watchdog,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that went off after its copy was planned is not held; its copy is no instant either."""
    clone, create = catching_up.clone_into_fd, engine.create_target

    def off(source: int, target: Path) -> int:
        domain.destroy()
        return create(source, target)

    def start_in_between(source: int, target: int) -> None:
        clone(source, target)
        domain.start()

    monkeypatch.setattr(engine, "create_target", off)
    monkeypatch.setattr(catching_up, "clone_into_fd", start_in_between)
    try:
        with pytest.raises(ServerChanged):
            capture(domain, folder, watchdog=watchdog)
    finally:
        domain.start()
        guest.wait_ready()
    assert list(folder.iterdir()) == []


def test_a_server_that_starts_meanwhile_is_not_copied(
    stopped: Domain, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a server that was started in the middle is thrown away."""
    real = catching_up.clone_into_fd

    def start_in_between(source: int, target: int) -> None:
        real(source, target)
        stopped.start()

    monkeypatch.setattr(catching_up, "clone_into_fd", start_in_between)
    try:
        with pytest.raises(ServerChanged):
            capture(stopped, folder, watchdog=watchdog)
        assert list(folder.iterdir()) == []
    finally:
        stopped.destroy()


def test_a_chain_is_flattened_by_stream(stopped: Domain, watchdog: Watchdog, folder: Path) -> None:
    """A disk that stands on another file is never reflinked alone."""
    disk = Path(DomainDefinition.parse(stopped.definition()).disks[0].path or "")
    base = disk.rename(disk.with_suffix(".base.qcow2"))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2"]
    subprocess.run([*command, str(disk)], check=True)
    taken = capture(stopped, folder, watchdog=watchdog)
    assert taken.way == "stream"
    assert "stands on another file" in taken.way_reason
    assert images.info(folder / "vda.qcow2", "qcow2").depends_on is None
    with pytest.raises(DiskNotCopyable):
        plan(stopped, folder, way="reflink")


def test_a_failing_ioctl_leaves_the_guest_running_and_no_file(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails inside the pause, the guest runs on and nothing is left."""

    def fail(_source: int, _target: int) -> None:
        assert guest.state() == "paused"
        raise CopyFailed("the disk broke")

    monkeypatch.setattr(catching_up, "clone_into_fd", fail)
    with pytest.raises(CopyFailed):
        capture(domain, folder, watchdog=watchdog)
    assert list(folder.iterdir()) == []
    assert guest.agent("guest-fsfreeze-status") == "thawed"


def test_too_little_room_is_refused_before_anything_happens(
    domain: Domain, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room the guest is neither paused nor frozen."""
    status = os.statvfs(folder)
    full = os.statvfs_result((*status[:4], 10, *status[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _path: full)
    steps: list[str] = []
    with pytest.raises(InsufficientSpace):
        capture(domain, folder, watchdog=watchdog, before=steps.append)
    assert steps == []


def test_a_copy_that_fails_leaves_no_pause_to_undo(
    domain: Domain, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freeze that was required fails, and the guest's owner may pause it from then on."""
    steps: list[str] = []
    monkeypatch.setattr("shared.hypervisor.agent.agent_ready", lambda _domain: False)
    with pytest.raises(QuiesceFailed):
        capture(domain, folder, watchdog=watchdog, quiesce="require", before=steps.append)
    assert (steps, list(folder.iterdir())) == (["pause", "resumed"], [])


def test_a_guest_that_is_on_its_way_elsewhere_is_not_paused(
    domain: Domain, watchdog: Watchdog, folder: Path, xfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its memory is written out, to a file as to another host, libvirt pauses a guest when
    asked, and resumes it only when that has ended. A backup is in nobody's way."""
    monkeypatch.setattr(domains, "OTHERS_JOB_S", 0)
    monkeypatch.setattr(memory, "_POLL_S", 0.005)
    outcomes: list[str] = []

    def check() -> None:
        if outcomes or not saving(domain.call("Looking", lambda handle: handle.jobStats())):
            return
        place, steps = folder / "place", list[str]()
        place.mkdir(mode=0o711)
        try:
            capture(domain, place, watchdog=watchdog, quiesce="never", before=steps.append)
        except LibvirtBusy as error:
            assert (steps, list(place.iterdir())) == ([], [])
            outcomes.append(error.detail)
            raise Cancelled("that will do") from error
        finally:
            shutil.rmtree(place)  # where it was taken: the save had ended, and there is another

    while not outcomes:
        with (
            contextlib.suppress(Cancelled),
            memory_saved(domain, watchdog, folder / "memory.save", ["vda"], check=check),
        ):
            pass
        (folder / "memory.save").unlink(missing_ok=True)
    assert "that somebody else began" in outcomes[0]

    scratch = xfs / "pull"  # the path of a socket is short
    scratch.mkdir()
    begin_another(domain, scratch)
    try:
        assert capture(domain, folder, watchdog=watchdog, quiesce="never").way == "reflink"
    finally:
        undo.abort_backup(domain.uri, domain.uuid, str(scratch))
        shutil.rmtree(scratch)


@pytest.mark.parametrize(
    ("way", "told"), [("reflink", ["pause", "resumed"]), ("stream", ["backup"])]
)
def test_a_guest_that_left_while_it_froze_is_not_paused(
    guest: Guest,
    domain: Domain,
    watchdog: Watchdog,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Literal["reflink", "stream"],
    told: list[str],
) -> None:
    """A freeze takes a while, in which somebody may begin to move the guest: it is thawed again,
    and that is not waited for."""
    found = iter([False, True])
    monkeypatch.setattr(Domain, "_has_job", lambda _self, _backups: next(found))
    monkeypatch.setattr(Domain, "suspend", lambda _self: pytest.fail("it was paused"))
    steps: list[str] = []
    with pytest.raises(LibvirtBusy):
        capture(domain, folder, watchdog=watchdog, way=way, quiesce="require", before=steps.append)
    assert (steps, list(folder.iterdir())) == (told, [])
    assert guest.agent("guest-fsfreeze-status") == "thawed"


def test_a_running_guests_disk_is_the_file_that_qemu_has_open(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """Where another file got its name, that would be copied in its place."""
    disk = guest.disks[1]
    own = disk.with_name("own")
    disk.rename(own)
    shutil.copyfile(own, disk)
    steps: list[str] = []
    try:
        with pytest.raises(DiskLost, match=str(disk)):
            capture(domain, folder, watchdog=watchdog, before=steps.append)
    finally:
        own.replace(disk)
    assert (steps, list(folder.iterdir())) == ([], [])
    assert capture(domain, folder, watchdog=watchdog, quiesce="never").way == "reflink"


def test_cancelled_before_the_pause(domain: Domain, watchdog: Watchdog, folder: Path) -> None:
    """A cancel before the pause leaves the guest alone."""
    steps: list[str] = []
    with pytest.raises(Cancelled):
        capture(domain, folder, watchdog=watchdog, cancelled=lambda: True, before=steps.append)
    assert (steps, list(folder.iterdir())) == ([], [])


@pytest.fixture
def fragmented(hypervisor: Hypervisor, xfs: Path) -> Iterator[Guest]:
    """A running guest whose data disk lies in thousands of pieces."""
    with Guest.create(hypervisor, xfs / "fragmented", disks=["qcow2", "raw"]) as made:
        data = made.disks[1]
        with data.open("r+b") as file:
            for offset in range(0, data.stat().st_size, 8192):
                os.pwrite(file.fileno(), os.pread(file.fileno(), 4096, offset), offset)
        yield made.start()


def test_fragmented_disks_are_shared_ahead_of_the_pause(
    fragmented: Guest, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a writer, few of thousands of pieces are left for the pause, and both disks are one
    instant: a number is written to the root disk before it is written to the other."""
    domain = find_by_name(connect(fragmented.hypervisor.uri), fragmented.name)
    assert plan(domain, folder).catching_up
    pieces = {"running": 0, "paused": 0}
    real = catching_up.clone_ranges

    def counted(source: int, target: int, ranges: Any) -> None:
        pieces[fragmented.state()] += len(ranges)
        real(source, target, ranges)

    monkeypatch.setattr(catching_up, "clone_ranges", counted)
    count = "n=$((n+1)); echo $n > /root/n; sync /root/n; echo $n > /data/n; sync /data/n"
    with busy(fragmented, count):
        taken = capture(
            domain, folder, watchdog=watchdog, quiesce="never", pause_budget_ms=MOMENT_MS
        )
    assert taken.way == "reflink"
    assert pieces["paused"] < 500
    assert extent_count(folder / "vdb.raw") > 5000
    print(f"paused {taken.pause_ms:.1f} ms")
    ahead = int(offline.read_file(folder / "vda.qcow2", "/root/n"))
    behind = int(offline.read_file(folder / "vdb.raw", "/n"))
    assert behind > 0
    assert 0 <= ahead - behind <= 1
    assert complaints(folder / "vdb.raw") == ""


def test_a_disk_that_fell_to_pieces_since_the_plan_holds_nobody(
    fragmented: Guest, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in one piece, so that nothing was shared ahead: all of it would be in the pause. It is
    shared ahead then, or, where that cannot be, streamed."""
    domain = find_by_name(connect(fragmented.hypervisor.uri), fragmented.name)
    monkeypatch.setattr(planning, "extent_count", lambda _path: 1)
    shared_ahead: list[int] = []
    real = engine.catch_up
    monkeypatch.setattr(engine, "catch_up", lambda *given: (shared_ahead.append(1), real(*given)))
    budget = MOMENT_MS / 50  # less than thousands of pieces take
    taken = capture(domain, folder, watchdog=watchdog, quiesce="never", pause_budget_ms=budget)
    assert (taken.way, shared_ahead) == ("reflink", [1])
    assert fragmented.state() == "running"

    shutil.rmtree(folder)
    folder.mkdir()
    folder.chmod(0o711)
    with monkeypatch.context() as unknown:
        unknown.setattr(engine, "writes_elsewhere", lambda _path: False)
        taken = capture(domain, folder, watchdog=watchdog, quiesce="never", pause_budget_ms=budget)
    assert (taken.way, "fragmented" in taken.way_reason) == ("stream", True)
    assert fragmented.state() == "running"

    shutil.rmtree(folder)
    folder.mkdir()
    folder.chmod(0o711)
    domain.suspend()  # its owner's pause has no budget
    try:
        assert capture(domain, folder, watchdog=watchdog, pause_budget_ms=5).way == "reflink"
    finally:
        domain.resume()


def test_a_pause_over_the_budget_is_not_made(
    fragmented: Guest, watchdog: Watchdog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be found and shared within the budget is streamed, and the result says why."""
    # Else a guest that just does not write needs no look (`CatchingUp._untouched`).
    monkeypatch.setattr(catching_up, "TICK_NS", 10**12)
    domain = find_by_name(connect(fragmented.hypervisor.uri), fragmented.name)
    another = folder / "another"
    another.mkdir(mode=0o711)
    steps: list[str] = []
    with busy(fragmented, "echo x >> /data/x; sync /data/x"):
        taken = capture(
            domain,
            folder,
            watchdog=watchdog,
            quiesce="never",
            pause_budget_ms=0.001,
            before=steps.append,
        )
        with pytest.raises(PauseTooLong):
            capture(
                domain,
                another,
                watchdog=watchdog,
                quiesce="never",
                pause_budget_ms=0.001,
                way="reflink",
            )
    assert (taken.way, taken.pause_ms) == ("stream", 0)
    assert "the guest would pause for" in taken.way_reason
    assert steps[-2:] == ["backup", "released"]
    assert complaints(folder / "vdb.raw") == ""  # a qcow2's clusters would have no holes either


def test_through_the_vault_and_out_again(
    guest: Guest, domain: Domain, watchdog: Watchdog, xfs: Path, workspace: Path
) -> None:
    """A published copy is materialised by reflink and by stream, equal to the stored one."""
    vault = Vault(xfs / f"vault-of-{domain.uuid}")
    with vault.begin("snapshot", "srv1", "snap1") as partial:
        taken = capture(domain, partial.path, watchdog=watchdog)
        final = partial.publish(
            Manifest(
                kind="snapshot",
                id="snap1",
                server=ManifestServer(id="srv1", name=domain.name, uuid=domain.uuid),
                taken_at=taken.taken_at,
                way=taken.way,
                consistency=taken.consistency,
                disks=[
                    ManifestDisk(
                        target=f.target,
                        file=f.path.name,
                        format=f.format,
                        virtual_bytes=f.virtual_bytes,
                        bytes=f.bytes,
                    )
                    for f in taken.files
                ],
            ),
            taken.definition,
        )
    stored = [
        CopiedDisk(d.target, final / d.file, d.format, d.virtual_bytes, d.bytes)
        for d in read_manifest(final).disks
    ]
    out = f"out-of-{domain.uuid}"
    for place, way in ((xfs / out, "reflink"), (workspace / out, "stream")):
        place.mkdir()
        destinations = {d.target: place / d.path.name for d in stored}
        assert materialise(stored, destinations) == way
        for disk in stored:
            pair = [str(disk.path), str(destinations[disk.target])]
            assert subprocess.run(["qemu-img", "compare", "-q", *pair]).returncode == 0
        with pytest.raises(FileExistsError):
            materialise(stored, destinations)
    assert {p.stat().st_mode & 0o777 for p in final.iterdir()} == {0o400}


def test_many_copies_under_load_all_pass(
    guest: Guest, domain: Domain, watchdog: Watchdog, folder: Path
) -> None:
    """Ten copies in a row of a busy guest: every one clean, every pause short."""
    pauses = []
    # Synced, since ext4 with 1 KiB blocks may itself commit a file that it is writing with
    # more blocks than size, which e2fsck reports (seen in plain copies of a paused guest too).
    with busy(guest, "dd if=/dev/urandom of=/data/w bs=64k count=32 conv=fsync 2>/dev/null"):
        for number in range(10):
            place = folder / str(number)
            place.mkdir()
            taken = capture(domain, place, watchdog=watchdog, quiesce="never")
            pauses.append(taken.pause_ms)
            assert complaints(place / "vdb.raw") == ""
    print("pauses", [round(pause, 1) for pause in pauses])
    assert max(pauses) < MOMENT_MS
