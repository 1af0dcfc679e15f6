"""A vault whose mount is missing is not taken for an empty one (docs/decisions/0036)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from live_server import SIZE, Live, live  # noqa: F401
from operations.spine import (  # noqa: F401
    World,
    any_database,
    database_url,
    environment,
    forget_caches,
    listening,
    outputs,
    python,
    world,
)
from operations.waiting import wait_for
from sqlalchemy import select, update

from lab import filesystems
from services.imager import images  # noqa: F401  registers the handlers
from services.snapshotter import snapshots  # noqa: F401  registers the handlers
from shared import admin, doctor, errors, faults, hosts, mounted, recovery  # noqa: F401
from shared.commands import (
    Command,
    CreateImage,
    DeleteImage,
    DeleteSnapshot,
    PromoteSnapshot,
    RestoreImage,
    RevertSnapshot,
    TakeSnapshot,
    UndoRestore,
    VerifyImage,
)
from shared.database import now, reading, transaction
from shared.models import Host, Image, Snapshot
from shared.models.hosts import SILENCE
from shared.operations import bystander, claim, journal, presence, runner
from shared.operations.bystander import Bystander, _left_behind
from shared.settings import settings
from shared.tending import tender
from shared.tending.tender import Tender
from shared.vault import Vault

CODE = "vault_not_mounted"


def host() -> Host:
    with reading() as session:
        return session.get_one(Host, "kvm-1")


def copies() -> list[Any]:
    """The rows of all copies: id, whether it is deleted, state."""
    with reading() as session:
        return [
            (each.id, each.deleted_at, getattr(each, "state", None))
            for model in (Image, Snapshot)
            for each in session.scalars(select(model))
        ]


def refused(root: Path) -> str:
    """What is said of the vault, once nothing was found to be written there."""
    before = below(root)
    with pytest.raises(errors.VaultNotMounted) as caught:
        mounted.ensure()
    assert before == below(root)
    return caught.value.detail


def below(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def admin_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    """Exit status and output of `triptych-admin`."""
    monkeypatch.setattr(sys, "argv", ["triptych-admin", *words])
    status = admin.main()
    printed = capsys.readouterr()
    return status, printed.out + printed.err


# On the real thing


def fails(live: Live, command: Command) -> None:  # noqa: F811
    """Demand that it ends with the error, and nothing is written or forgotten."""
    before = copies(), live.disk.read_bytes()
    ended = live.done(command)
    assert (ended.state, (ended.error or {})["code"]) == ("failed", CODE), ended.error
    assert "Nothing was touched. Mount" in (ended.error or {})["message"]
    assert (copies(), live.disk.read_bytes()) == before
    assert below(live.root) == []


@pytest.mark.vm
def test_nothing_is_done_while_the_mount_is_missing(live: Live) -> None:  # noqa: F811
    """Whatever would copy, read or remove a copy fails at once, and works again, in the same
    process, once it is mounted: rows, copies and the server's disk are as they were."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    snapshot = live.succeeds(TakeSnapshot(server=live.server.id))["snapshot"]
    live.unmount()

    for command in (
        CreateImage(server=live.server.id),
        TakeSnapshot(server=live.server.id, replace=True),
        PromoteSnapshot(server=live.server.id),
        RevertSnapshot(server=live.server.id),
        RestoreImage(image=image),
        VerifyImage(image=image),
        DeleteSnapshot(server=live.server.id, snapshot=snapshot, expired=True),
        DeleteImage(image=image),
    ):
        fails(live, command)

    live.mount()
    assert live.succeeds(VerifyImage(image=image))["verified"] == "passed"
    live.succeeds(CreateImage(server=live.server.id))
    live.succeeds(DeleteImage(image=image))
    live.succeeds(RevertSnapshot(server=live.server.id))
    live.unmount()
    assert below(live.root) == []


@pytest.mark.vm
def test_restore_can_be_undone_without_the_vault(live: Live) -> None:  # noqa: F811
    """What was set aside is beside the disks: a lost vault does not keep it from its server."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.disk.write_bytes(b"later".ljust(SIZE, b"."))
    restore = live.done(RestoreImage(image=image))
    assert not live.disk.read_bytes().startswith(b"later")
    live.unmount()

    live.succeeds(UndoRestore(operation=restore.id))

    assert live.disk.read_bytes().startswith(b"later")
    assert below(live.root) == []


@pytest.mark.vm
def test_host_says_that_its_vault_is_not_mounted(live: Live) -> None:  # noqa: F811
    """For as long as it is so; the rest of what is known of it stays."""
    hosts.report()
    facts = host().facts
    live.unmount()

    hosts.report()
    assert "is not the vault of host kvm-1: it has no mark" in (host().problem or "")
    assert (host().answering, host().silent, host().facts) == (False, False, facts)
    assert below(live.root) == []

    live.mount()
    hosts.report()
    assert (host().answering, host().problem) == (True, None)


@pytest.mark.vm
def test_worker_that_starts_before_the_mount_waits_for_it(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a reboot: it says so, makes no directory, and goes on by itself."""
    monkeypatch.setattr(hosts, "AGAIN_S", 0.1)
    monkeypatch.setattr(mounted, "_known", None)
    live.unmount()
    reporter, bystander = hosts.HostReporter(), Bystander()
    reporter.start()
    bystander.start()
    try:
        wait_for(lambda: "no mark" in (host().problem or ""))
        assert below(live.root) == []
        live.mount()
        wait_for(lambda: host().answering)
    finally:
        for each in (reporter, bystander):
            each.stop()
            each.join(10)


@pytest.mark.vm
@pytest.mark.parametrize("lock", ["there", "missing"])
def test_worker_that_starts_on_a_read_only_vault_reports(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    lock: str,
) -> None:
    """Restores go on there. Where it cannot be one of those that take turns, it says why, and goes
    on by itself once it can."""
    monkeypatch.setattr(hosts, "AGAIN_S", 0.1)
    path, real, rescued = live.root / ".reporter.lock", os.open, threading.Event()
    if lock == "there":
        path.touch()

    def refusing(opened: Any, flags: int, *rest: Any, **named: Any) -> int:
        if opened == path and flags & os.O_CREAT and not rescued.is_set():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(opened, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    reporter = hosts.HostReporter()
    reporter.start()
    try:
        if lock == "missing":
            wait_for(lambda: f"{path} cannot be opened" in (host().problem or ""))
            rescued.set()
        wait_for(lambda: host().facts and host().answering)
    finally:
        reporter.stop()
        reporter.join(10)


@pytest.mark.vm
def test_host_is_not_silent_while_a_report_waits_for_libvirt(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One domain that hangs would have all others' work wait for workers that are there."""
    began, over = threading.Event(), threading.Event()

    def hanging(_connection: object) -> list[Any]:
        began.set()
        assert over.wait(60)
        return []

    monkeypatch.setattr(hosts, "PULSE_S", 0.1)
    monkeypatch.setattr(hosts.inventory, "scan", hanging)
    reporter = hosts.HostReporter()
    reporter.start()
    try:
        assert began.wait(60)
        with transaction() as session:
            past = now() - 2 * SILENCE
            session.execute(update(Host).where(Host.name == "kvm-1").values(last_seen_at=past))  # type: ignore[arg-type]
        wait_for(lambda: not host().silent)
        assert host().answering
        monkeypatch.setattr(hosts, "SILENCE", timedelta(0))
        wait_for(lambda: "libvirt has not answered" in (host().problem or ""))
        assert not host().silent
    finally:
        over.set()
        reporter.stop()
        reporter.join(10)


@pytest.mark.vm
def test_doctor_and_rescan_take_no_copy_for_gone(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They look at nothing, so that --fix has nothing to mark."""
    live.succeeds(CreateImage(server=live.server.id))
    before = copies()
    live.unmount()

    (found,) = doctor.examine()
    assert (found.check, found.repair) == ("vault", None)
    assert "has no mark" in found.detail
    assert "vault adopt" in found.remedy
    doctor.repair([found])
    status, printed = admin_says(monkeypatch, capsys, "vault", "rescan")
    assert (status, "is not the vault of host kvm-1" in printed) == (1, True)
    assert (copies(), below(live.root)) == (before, [])

    live.mount()
    assert doctor.examine() == []
    assert admin_says(monkeypatch, capsys, "vault", "rescan")[0] == 0


# What is the host's vault


def lose(root: Path) -> None:
    """The mount goes; what was mounted is beside it."""
    root.rename(root.with_name("mounted"))
    root.mkdir()


def regain(root: Path) -> None:
    root.rmdir()
    root.with_name("mounted").rename(root)


@pytest.fixture
def root(world: World) -> Path:  # noqa: F811
    """The directory of a vault that is known."""
    return settings().vault


@pytest.fixture
def empty(root: Path) -> Path:
    """The same where the mount is missing."""
    lose(root)
    return root


def forget_vault() -> None:
    """As an earlier version left the row, and a worker that has just started knows nothing."""
    with transaction() as session:
        session.execute(update(Host).values(vault_id=None))
    mounted._known = None


def test_check_asks_no_database(root: Path) -> None:
    """As long as the mark is what it was: it is on the way of every copy."""
    with listening() as sent:
        mounted.ensure()
        assert mounted.is_there()
    assert sent == []


def test_older_installation_is_marked_by_itself(root: Path) -> None:
    """With its copies, or without any, at the first look after the upgrade."""
    for copy in (root / "images" / "srv_1" / "img_1", None):
        forget_vault()
        (root / mounted.MARK).unlink()
        if copy:
            copy.mkdir(parents=True)
        mounted.ensure()
        assert (root / mounted.MARK).read_text().startswith(f"{host().vault_id}\n")


def test_older_installation_that_cannot_be_marked_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say a full one, with the reason; it is marked once that can be done."""
    forget_vault()
    (root / mounted.MARK).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(mounted, "MARK", "x" * 256)  # no file system takes such a name
        assert "cannot be written: " in refused(root)
    assert host().vault_id is None

    mounted.ensure()
    assert (root / mounted.MARK).read_text().startswith(f"{host().vault_id}\n")


def test_older_installation_is_not_marked_below_a_missing_mount(
    world: World,  # noqa: F811
    empty: Path,
    any_database: str,  # noqa: F811
) -> None:
    """The database knows copies, and there is none; one that it has as missing is none."""
    forget_vault()
    server = world.server()
    image = Image(server_id=server.id, name="golden", consistency="crash", way="reflink", bytes=1)
    world.add(image)
    assert "the database knows copies of this host" in refused(empty)
    assert host().vault_id is None
    with transaction() as session:
        session.get_one(Image, image.id).state = "missing"
    mounted.ensure()
    assert host().vault_id


def test_database_that_was_restored_takes_the_mark_that_is_there(root: Path) -> None:
    """Its backup is older than the mark, or it was lost altogether."""
    known = host().vault_id
    forget_vault()
    mounted.ensure()
    assert host().vault_id == known is not None


def test_vault_that_is_no_directory_is_not_made(root: Path) -> None:
    """The file system may be mounted further up."""
    root.rename(root.with_name("mounted"))
    assert "no such directory" in refused(root)
    assert not root.exists()


def test_vault_that_was_replaced_is_used_once_that_is_said(
    empty: Path,
    any_database: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With or without a mark of its own; then the former one is another, also for those who
    had known it."""
    assert "no mark" in refused(empty)
    status, printed = admin_says(monkeypatch, capsys, "vault", "adopt")
    assert (status, str(empty) in printed) == (0, True)
    mounted.ensure()

    empty.rename(empty.with_name("second"))
    empty.with_name("mounted").rename(empty)
    assert "the mark of another one" in refused(empty)
    assert admin_says(monkeypatch, capsys, "vault", "adopt")[0] == 0
    mounted.ensure()


def test_adoption_of_no_directory_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is to be mounted first."""
    shutil.rmtree(root)
    with pytest.raises(SystemExit):
        admin_says(monkeypatch, capsys, "vault", "adopt")
    assert not root.exists()


def test_workers_that_start_at_once_agree_on_a_mark(
    root: Path,
    any_database: str,  # noqa: F811
) -> None:
    """The three of a new host, of which the database has no row yet."""
    shutil.rmtree(root)
    with transaction() as session:
        session.delete(session.get_one(Host, "kvm-1"))
    code = "from shared import mounted; mounted.ensure(); print(mounted._known)"
    told = outputs([python(code) for _ in range(3)])  # the last line is no log
    assert {each.splitlines()[-1] for each in told} == {host().vault_id}


# Who lives


def test_living_worker_is_not_taken_for_dead_without_the_vault(
    world: World,  # noqa: F811
    root: Path,
) -> None:
    """Its lock is in the vault: without that its lease alone tells, also of one that began then."""
    operations = [world.snapshot_of(world.server(name)) for name in ("before", "after")]
    with presence.attempt("snapshotter") as owner:
        assert claim.claim(operations[0], owner)
        lose(root)
        with presence.attempt("snapshotter") as other:
            assert claim.claim(operations[1], other)
            assert [presence.of(each) for each in (owner, other)] == ["unknown"] * 2
            regain(root)
            mounted.ensure()
            assert [presence.of(each) for each in (owner, other)] == ["alive", "unknown"]
            world.expire(operations[1])
            assert claim.take_over(operations[1], "kvm-1/snapshotter/x") is None
            world.expire(operations[1], claim.STALLED * settings().lease)
            assert claim.take_over(operations[1], "kvm-1/snapshotter/x")


def test_living_worker_is_not_taken_for_dead_where_its_vault_was_replaced(
    world: World,  # noqa: F811
    root: Path,
) -> None:
    """Its container still has the old one: in the new one its lock is not looked for."""
    operation = world.snapshot_of(world.server())
    with presence.attempt("snapshotter") as owner:
        assert claim.claim(operation, owner)
        root.rename(root.with_name("old"))
        root.mkdir()
        mounted.adopt()
        mounted.ensure()
        world.expire(operation)

        assert presence.of(owner) == "unknown"
        assert _left_behind() == set()
        assert claim.take_over(operation, "kvm-1/snapshotter/x") is None


def test_mount_that_goes_while_a_lock_is_looked_for_says_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there a moment ago: its lock file is not missing for a death."""
    real = presence._opened

    def opened(path: Path) -> int:
        lose(root)
        return real(path)

    with presence.attempt("snapshotter") as owner:
        monkeypatch.setattr(presence, "_opened", opened)
        assert presence.of(owner) == "unknown"


def test_lock_made_below_a_mount_that_has_just_gone_is_none(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the vault is back nobody finds it, and its owner would look dead."""
    real = presence._locked

    def locked(path: Path) -> int:
        lose(root)
        path.parent.mkdir()
        return real(path)

    monkeypatch.setattr(presence, "_locked", locked)
    with presence.attempt("snapshotter") as owner:
        assert owner.endswith(f"@{presence.UNSEEN}")
        root.joinpath(".workers").rename(root.with_name("below"))
        regain(root)
        mounted.ensure()
        assert presence.of(owner) == "unknown"


def test_guest_of_one_known_to_be_dead_waits_for_no_vault(
    world: World,  # noqa: F811
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """libvirt was away at the first try, and at the second the vault is."""
    dead = f"kvm-1/snapshotter/dead@{mounted.known()}"
    operation = world.snapshot_of(world.server())
    assert claim.claim(operation, dead)
    with transaction() as session:
        journal.write(session, operation, "undo", "note", step="resumed")
    monkeypatch.setattr(bystander, "AT_ONCE", ("note",))
    with monkeypatch.context() as patch:
        patch.setattr(journal, "act", lambda entry: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bystander.attend(dead)
    lose(root)

    bystander.attend(dead)

    assert world.played == ["resumed"]


@pytest.mark.parametrize("obstacle", ["read-only", "full"])
def test_work_goes_on_where_no_lock_can_be_made(
    world: World,  # noqa: F811
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    obstacle: str,
) -> None:
    """Else the guest of a killed worker would not be given back until the disk is mended."""
    dead = f"kvm-1/snapshotter/dead@{mounted.known()}"
    presence._made()
    presence._file(dead).touch()
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).startswith(str(presence.folder())):
            if obstacle == "read-only" and flags & (os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, "Read-only file system")
            if obstacle == "full" and flags & os.O_CREAT:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    assert presence.of(dead, sweep=False) == "dead"
    operation = world.snapshot_of(world.server())
    assert claim.claim(operation, dead)
    with presence.attempt("snapshotter") as owner:
        assert presence.of(owner) == "unknown"
        assert claim.take_over(operation, owner)


def test_guest_is_given_back_without_the_vault_and_the_folder_later(
    world: World,  # noqa: F811
    empty: Path,
    any_database: str,  # noqa: F811
) -> None:
    """A worker died and the mount went: the half-made copy waits until it can be removed."""
    mine = empty.with_name("mounted")
    partial = mine / "snapshots" / "srv_1" / "snp_1.partial"
    partial.mkdir(parents=True)
    operation = world.snapshot_of(world.server())
    assert claim.claim(operation, "kvm-1/snapshotter/dead")
    with transaction() as session:
        folder = str(empty / "snapshots" / "srv_1" / "snp_1")
        journal.write(session, operation, "undo", "remove_copy", folder=folder)
        journal.write(session, operation, "undo", "note", step="resumed")
    world.change(operation, attempt=settings().max_attempts)
    world.expire(operation, claim.STALLED * settings().lease)

    runner.run(operation)
    row = world.row(operation)
    assert (row.state, world.played) == ("running", ["resumed"])
    assert (row.error or {})["code"] == "not_cleared_up"
    assert below(empty) == []

    empty.rmdir()
    mine.rename(empty)
    world.expire(operation)
    runner.run(operation)
    assert (world.row(operation).error or {})["code"] == "worker_lost"
    assert below(empty / "snapshots") == []


@pytest.mark.parametrize("side", ["undo", "redo"])
def test_copy_is_removed_from_a_vault_that_was_moved(
    world: World,  # noqa: F811
    empty: Path,
    monkeypatch: pytest.MonkeyPatch,
    any_database: str,  # noqa: F811
    side: Any,
) -> None:
    """Its worker was stopped while it made, or removed it, and the vault has another path now."""
    (empty / "snapshots" / "srv_1" / "snp_1").mkdir(parents=True)
    mounted.adopt()
    operation = world.snapshot_of(world.server())
    assert claim.claim(operation, "kvm-1/snapshotter/dead")
    with transaction() as session:
        folder = str(empty / "snapshots" / "srv_1" / "snp_1")
        journal.write(session, operation, side, "remove_copy", folder=folder)
    done = {"committed": True} if side == "redo" else {"attempt": settings().max_attempts}
    world.change(operation, **done)
    world.expire(operation, claim.STALLED * settings().lease)
    moved = empty.with_name("moved")
    empty.rename(moved)
    monkeypatch.setenv("TRIPTYCH_VAULT", str(moved))
    settings.cache_clear()

    runner.run(operation)

    row = world.row(operation)
    assert row.state == ("succeeded" if side == "redo" else "failed"), row.error
    assert below(moved / "snapshots") == []


def test_nothing_is_begun_that_a_read_only_vault_does_not_let_end(live: Live) -> None:  # noqa: F811
    """A deletion would hold up its server for as long as the disk stays so: restores and
    verifications of what can be read go on."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]
    live.succeeds(TakeSnapshot(server=live.server.id))
    remount = ["mount", "-o", "remount,bind,{}", str(live.root)]

    subprocess.run([each.format("ro") for each in remount], check=True)
    for command in (DeleteSnapshot(server=live.server.id), DeleteImage(image=image)):
        refused = live.done(command)
        assert (refused.state, (refused.error or {})["code"]) == ("failed", "vault_read_only")
    live.succeeds(RestoreImage(image=image))
    live.succeeds(VerifyImage(image=image))

    subprocess.run([each.format("rw") for each in remount], check=True)
    live.succeeds(DeleteSnapshot(server=live.server.id))
    live.succeeds(DeleteImage(image=image))
    assert list(Vault(live.root).copies()) == []


def test_copy_that_a_disk_fails_under_holds_nobody_up(
    live: Live,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file system became read-only: what was copied by then is left, for the doctor."""
    image = live.succeeds(CreateImage(server=live.server.id))["image"]

    folder = live.root / "images"

    def fail(name: str) -> None:
        if name == "stream:disk-copied":
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    monkeypatch.setattr(faults, "point", fail)
    assert live.done(CreateImage(server=live.server.id)).state == "failed"
    monkeypatch.undo()
    live.succeeds(RestoreImage(image=image))

    filesystems.unmount(folder)
    left = Vault(live.root).partials()
    assert len(left) == 1
    doctor.repair([each for each in doctor.examine() if each.check == "leftover"])
    assert Vault(live.root).partials() == []


def test_background_work_rests_without_the_vault(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured of copies that cannot be seen."""
    turns: list[bool] = []
    monkeypatch.setattr(tender, "EVERY_S", 0.02)
    monkeypatch.setattr(Tender, "turn", lambda self: turns.append(mounted.seems_there()))
    thread = Tender("test")
    thread.start()
    try:
        thread.join(0.5)
        assert turns == []
        regain(empty)
        wait_for(lambda: turns)
    finally:
        thread.stop()
        thread.join(10)
    assert all(turns)
