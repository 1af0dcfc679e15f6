"""Deleting clones destroys data: what goes, what never does, and what a crash leaves."""

from __future__ import annotations

import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from farms.farmed import (
    SIZE,
    Farmed,
    forgotten_before_it_is_held,
    killed_at,
    outcomes,
    passing,
    plug,
)
from operations.spine import at_once
from operations.waiting import wait_for
from sqlalchemy import select

from lab.guest import Guest, attach, make_disk
from services.cloner import farms, removal
from shared import errors, faults, forgetting, lookups
from shared.commands import (
    CreateImage,
    DeleteClone,
    DeleteFarm,
    ForgetRevert,
    RetryFarm,
    TakeSnapshot,
)
from shared.database import now, reading, transaction
from shared.disks import setaside
from shared.disks.overlays import create_overlay
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import LibvirtBusy
from shared.models import Clone, Farm, Image, Operation, Schedule, Server, Snapshot
from shared.operations import claim, runner
from shared.operations.tasks import forget_due
from shared.settings import settings

pytestmark = pytest.mark.vm


def test_farm_goes_and_nothing_else(farmed: Farmed) -> None:
    """Domains, disks, registrations and the farm are gone and told; a bystander of a like name
    and the clones of another farm stay."""
    farm, made = farmed.farm(2)
    other, others = farmed.farm(1)
    bystander = farmed.guest(f"{made[0].guest.name}-not-ours")

    ended = farmed.done(DeleteFarm(farm=farm.name))

    assert ended.state == "succeeded", ended.error
    assert {each["state"] for each in outcomes(ended).values()} == {"deleted"}
    assert [each.is_gone for each in made] == [True, True]
    assert others[0].is_whole
    assert bystander.state() == "stopped"
    assert all(path.exists() for path in bystander.disks)
    with reading() as session:
        assert session.get_one(Farm, farm.id).deleted_at is not None
        assert session.get_one(Farm, other.id).deleted_at is None
        assert all(session.get_one(Server, each.server.id).forgotten_at for each in made)
    told = farmed.world.events("clone.deleted")
    assert [each["clone"] for each in told] == [each.clone.id for each in made]
    assert [each["farm"] for each in farmed.world.events("farm.deleted")] == [farm.id]


def test_domain_of_the_same_name_is_not_the_clone(farmed: Farmed) -> None:
    """Somebody undefined the clone and gave its name, and its disk, to a VM of their own: that
    runs on, with the disk, and the result says why."""
    farm, (made,) = farmed.farm(1)
    made.guest.domain.undefine()
    mine = farmed.guest(made.guest.name, [made.disk])
    uuid = mine.domain.UUIDString()
    assert uuid != made.server.domain_uuid
    boot = mine.start(wait=False).domain.ID()

    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert (mine.domain.UUIDString(), mine.domain.ID()) == (uuid, boot)
    assert made.disk.exists()
    (left,) = outcomes(ended)[made.clone.name]["left"]
    assert left["path"] == str(made.disk)
    assert mine.name in left["reason"]


def test_clone_goes_by_its_uuid_whatever_it_is_called(farmed: Farmed) -> None:
    """One that its owner renamed is the clone still."""
    farm, (made,) = farmed.farm(1)
    made.guest.domain.rename(f"{made.guest.name}-renamed", 0)
    farmed.done(DeleteFarm(farm=farm.id))
    names = {each.name() for each in farmed.guests[0].connection.listAllDomains()}
    assert f"{made.guest.name}-renamed" not in names
    assert not made.disk.exists()


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_disk_that_was_attached_later_stays(farmed: Farmed, fmt: str) -> None:
    """It goes out of use with its VM, and the result says where it is."""
    farm, (made,) = farmed.farm(1)
    data = farmed.disk(fmt)
    plug(made.guest, data, fmt=fmt)

    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert made.is_gone
    assert data.exists()
    assert [each["path"] for each in outcomes(ended)[made.clone.name]["left"]] == [str(data)]


def test_disk_that_another_domain_has_stays(farmed: Farmed) -> None:
    """The clone goes; its disk, which a VM of somebody else has too, does not."""
    farm, (made, whole) = farmed.farm(2)
    other = farmed.guest()
    plug(other, made.disk)

    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert made.guest.state() == "missing"
    assert made.disk.exists()
    (left,) = outcomes(ended)[made.clone.name]["left"]
    assert (left["path"], other.name in left["reason"]) == (str(made.disk), True)
    assert whole.is_gone


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_disk_that_an_overlay_needs_stays(farmed: Farmed, whose: str) -> None:
    """An overlay that was made later, of the clone's own domain or of another, keeps what is
    below it."""
    farm, (made,) = farmed.farm(1)
    overlay = farmed.disks / "later.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(made.disk)]
    subprocess.run([*command, str(overlay)], check=True)
    plug(made.guest if whose == "its own" else farmed.guest(), overlay, fmt="qcow2")

    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert made.guest.state() == "missing"
    assert made.disk.exists()
    assert overlay.exists()
    left = {each["path"] for each in outcomes(ended)[made.clone.name]["left"]}
    assert str(made.disk) in left


def test_files_that_were_not_recorded_stay(farmed: Farmed) -> None:
    """A clone of before there were records: its domain goes, its disk is named."""
    farm, (made,) = farmed.farm(1)
    with transaction() as session:
        session.get_one(Clone, made.clone.id).files = None
    ended = farmed.done(DeleteFarm(farm=farm.id))
    assert (made.guest.state(), made.disk.exists()) == ("missing", True)
    assert outcomes(ended)[made.clone.name]["left"][0]["path"] == str(made.disk)


def test_link_in_place_of_a_file_stays(farmed: Farmed) -> None:
    """Its owner moved the disk elsewhere and left a link: neither is touched."""
    farm, (made,) = farmed.farm(1)
    moved = farmed.disks / "moved.raw"
    made.disk.rename(moved)
    made.disk.symlink_to(moved)
    ended = farmed.done(DeleteFarm(farm=farm.id))
    assert moved.exists()
    assert made.disk.is_symlink()
    assert outcomes(ended)[made.clone.name]["left"]


def test_clone_whose_domain_is_gone_already(farmed: Farmed) -> None:
    """What is left of it goes."""
    farm, (made, _) = farmed.farm(2)
    made.guest.domain.undefine()
    ended = farmed.done(DeleteFarm(farm=farm.id))
    assert made.is_gone
    assert outcomes(ended)[made.clone.name]["state"] == "deleted"


def test_running_clones_are_stopped(farmed: Farmed) -> None:
    """Also a paused one."""
    farm, made = farmed.farm(2)
    for each in made:
        each.guest.start(wait=False)
    made[1].guest.domain.suspend()
    assert farmed.done(DeleteFarm(farm=farm.id)).state == "succeeded"
    assert [each.is_gone for each in made] == [True, True]


def test_server_with_work_of_its_own_is_left(farmed: Farmed) -> None:
    """Queued or running: it is named with that operation, and the others go. Asked again after
    its end, it goes too."""
    farm, made = farmed.farm(3)
    first = farmed.world.submit(CreateImage(server=made[0].server.id))
    assert claim.claim(first, "kvm-1/imager/one")
    second = farmed.world.submit(TakeSnapshot(server=made[1].server.id))

    ended = farmed.done(DeleteFarm(farm=farm.id))

    found = outcomes(ended)
    assert [each["state"] for each in found.values()] == ["failed", "failed", "deleted"]
    for each, operation in ((made[0], first), (made[1], second)):
        error = found[each.clone.name]["error"]
        assert (error["code"], operation in error["message"]) == ("server_busy", True)
        assert each.is_whole
    with reading() as session:
        assert session.get_one(Farm, farm.id).deleted_at is None
    for each in (first, second):
        farmed.world.change(each, state="failed", finished_at=now())
    farmed.done(DeleteFarm(farm=farm.id))
    assert [each.is_gone for each in made] == [True] * 3


def test_all_busy_is_a_failure(farmed: Farmed) -> None:
    """Where nothing could be deleted, the operation says so with the first one's reason."""
    farm, (made,) = farmed.farm(1)
    farmed.world.submit(CreateImage(server=made.server.id))
    ended = farmed.done(DeleteFarm(farm=farm.id))
    assert (ended.state, ended.error and ended.error["code"]) == ("failed", "server_busy")
    assert made.is_whole


def test_one_that_fails_leaves_the_others_alone(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as it was, running again, and the farm keeps it alone."""
    farm, made = farmed.farm(2)
    made[0].guest.start(wait=False)
    real = removal.removal.set_aside

    def refuse(files: list[Path], operation_id: str) -> None:
        real(files, operation_id)
        if made[0].disk in files:
            raise OSError("a mishap")

    monkeypatch.setattr(removal.removal, "set_aside", refuse)
    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert [each["state"] for each in outcomes(ended).values()] == ["failed", "deleted"]
    assert made[0].is_whole
    assert made[0].guest.state() == "running"
    assert made[1].is_gone
    assert set(farmed.states(farm).values()) == {"ready", "deleted"}


def test_started_by_somebody_meanwhile(farmed: Farmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that runs again when its files are to go is left, on its files."""
    farm, made = farmed.farm(2)
    real = removal._stop

    def stop_and_start(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        made[0].guest.start(wait=False)

    monkeypatch.setattr(removal, "_stop", stop_and_start)
    ended = farmed.done(DeleteFarm(farm=farm.id))
    assert outcomes(ended)[made[0].clone.name]["error"]["code"] == "server_changed"
    assert made[0].is_whole
    assert made[0].guest.state() == "running"
    assert made[1].is_gone


def test_disk_that_a_domain_was_defined_on_meanwhile_stays(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To stop a hundred guests takes a minute: the clone is left as it was, and the others go."""
    farm, made = farmed.farm(2)
    for each in made:
        each.guest.start(wait=False)
    other = farmed.guest()
    real = removal._stop

    def stop_and_plug(*arguments: Any) -> bool:
        stopped = real(*arguments)
        plug(other, made[0].disk)
        return stopped

    monkeypatch.setattr(removal, "_stop", stop_and_plug)
    ended = farmed.done(DeleteFarm(farm=farm.id))
    error = outcomes(ended)[made[0].clone.name]["error"]
    assert (error["code"], other.name in error["message"]) == ("server_changed", True)
    assert made[0].is_whole
    assert made[0].guest.state() == "running"
    assert made[1].is_gone


def test_one_that_cannot_be_started_again_keeps_no_other(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner gave it a disk that is not there: the others go all the same, and it is started
    again once it can be."""
    farm, made = farmed.farm(2)
    made[0].guest.start(wait=False)
    later = farmed.disks / "later.raw"
    real = removal._stop

    def stop_and_change(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        plug(made[0].guest, later)

    monkeypatch.setattr(removal, "_stop", stop_and_change)
    operation = farmed.world.submit(DeleteFarm(farm=farm.id))
    runner.run(operation)

    assert made[1].is_gone
    assert made[0].guest.state() == "stopped"
    waiting = farmed.world.row(operation)
    assert (waiting.state, (waiting.error or {})["code"]) == ("running", runner.NOT_CLEARED_UP)
    make_disk(farmed.disks, "raw", "blank", SIZE).rename(later)
    farmed.world.expire(operation)
    runner.run(operation)
    ended = farmed.world.row(operation)
    assert [each["state"] for each in outcomes(ended).values()] == ["failed", "deleted"]
    assert made[0].guest.state() == "running"


def test_one_that_goes_off_too_late_is_started_again(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given up, and then its power went after all: it is left as it was, and the other
    goes."""
    farm, made = farmed.farm(2)
    for each in made:
        each.guest.start(wait=False)
    real = Domain.destroy

    def late(domain: Domain) -> None:
        real(domain)
        if domain.uuid == made[0].server.domain_uuid:
            raise LibvirtBusy("QEMU is stuck")

    monkeypatch.setattr(Domain, "destroy", late)
    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert [each["state"] for each in outcomes(ended).values()] == ["failed", "deleted"]
    assert made[0].is_whole
    assert made[0].guest.state() == "running"
    assert made[1].is_gone


def test_clones_stay_while_the_vault_is_not_mounted(farmed: Farmed) -> None:
    """Their snapshots would have to go with them: it is refused before anything is stopped."""
    farm, (made,) = farmed.farm(1)
    root = settings().vault
    root.rename(root.with_name("mounted"))
    root.mkdir()

    ended = farmed.done(DeleteFarm(farm=farm.id))

    assert (ended.error or {})["code"] == "vault_not_mounted"
    assert made.is_whole
    assert list(root.iterdir()) == []


def test_clone_is_started_again_though_the_vault_is_gone(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One could not be deleted; the folder of another's snapshot waits, and keeps nobody off."""
    farm, made = farmed.farm(2)
    made[0].guest.start(wait=False)
    copied = {"server_id": made[1].server.id, "consistency": "crash", "way": "reflink", "bytes": 1}
    snapshot = Snapshot(taken_at=now(), expires_at=now() + timedelta(days=2), **copied)
    farmed.world.add(snapshot)
    real, root, extra = removal._stop, settings().vault, farmed.disks / "extra.raw"
    folder = root / "snapshots" / made[1].server.id / snapshot.id
    folder.mkdir(parents=True)
    make_disk(farmed.disks, "raw", "blank", SIZE).rename(extra)

    def stop_and_change(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        plug(made[0].guest, extra)

    def lose(point: str) -> None:
        if point == "committed":
            root.rename(root.with_name("mounted"))
            root.mkdir()

    monkeypatch.setattr(removal, "_stop", stop_and_change)
    monkeypatch.setattr(faults, "point", lose)
    operation = farmed.world.submit(DeleteFarm(farm=farm.id))
    runner.run(operation)

    waiting = farmed.world.row(operation)
    assert (waiting.state, (waiting.error or {})["code"]) == ("running", runner.NOT_CLEARED_UP)
    assert made[0].guest.state() == "running"
    monkeypatch.undo()
    root.rmdir()
    root.with_name("mounted").rename(root)
    farmed.world.expire(operation)
    runner.run(operation)
    assert farmed.world.row(operation).state == "succeeded"
    assert made[1].is_gone and not folder.exists()


def test_what_hangs_on_a_clone(farmed: Farmed) -> None:
    """Its snapshot, its schedules and what a revert kept go with it; its images stay. The end of
    the time to undo, which comes later, brings nothing back."""
    farm, (made,) = farmed.farm(1)
    server, moment = made.server.id, now()
    revert = farmed.world.snapshot_of(made.server)
    copied = {"server_id": server, "consistency": "crash", "way": "reflink", "bytes": 1}
    snapshot = Snapshot(taken_at=moment, expires_at=moment + timedelta(days=2), **copied)
    image = Image(name="kept", **copied)
    plan = {"kind": "daily", "at": "03:00", "timezone": "UTC", "keep": 7, "catch_up_s": 60}
    farmed.world.add(snapshot, image, Schedule(server_id=server, **plan))
    folders = [
        settings().vault / "snapshots" / server / snapshot.id,
        settings().vault / "images" / server / image.id,
    ]
    for each in folders:
        each.mkdir(parents=True)
    live = {"vda": made.disk}
    setaside.prepare(live, revert)["vda"].write_bytes(b"reverted")
    setaside.swap(live, revert)
    undo = {"live": {"vda": str(made.disk)}, "previous": None, "missing": []}
    ended = {"kind": "snapshot.revert", "state": "succeeded", "finished_at": moment, "undo": undo}
    farmed.world.change(revert, undo_until=moment + timedelta(hours=1), **ended)

    told = outcomes(farmed.done(DeleteFarm(farm=farm.id)))[made.clone.name]

    assert made.is_gone
    assert (told["snapshot"], told["images_kept"]) == (snapshot.id, 1)
    assert [each.exists() for each in folders] == [False, True]
    with reading() as session:
        assert session.get_one(Snapshot, snapshot.id).deleted_at is not None
        assert session.get_one(Image, image.id).deleted_at is None
        assert not session.scalars(select(Schedule)).all()
    farmed.world.change(revert, undo_until=moment - timedelta(hours=1))
    forget_due()
    forgotten = farmed.world.submit(ForgetRevert(operation=revert))
    runner.run(forgotten)
    assert not made.disk.exists()


def test_single_clone(farmed: Farmed) -> None:
    """It goes, and the last one takes the farm with it; a second request for it is refused."""
    farm, made = farmed.farm(2)
    assert farmed.done(DeleteClone(clone=made[0].clone.name)).state == "succeeded"
    assert (made[0].is_gone, made[1].is_whole) == (True, True)
    with reading() as session:
        assert session.get_one(Farm, farm.id).deleted_at is None
        with pytest.raises(errors.CloneNotFound):
            lookups.clone(session, made[0].clone.name)
    farmed.done(DeleteClone(clone=made[1].clone.id))
    with reading() as session:
        assert session.get_one(Farm, farm.id).deleted_at is not None


def test_single_clone_waits_in_its_server_s_line(farmed: Farmed) -> None:
    """What was asked for before it on that server comes first."""
    _, made = farmed.farm(2)
    farmed.world.submit(CreateImage(server=made[0].server.id))
    waiting = farmed.world.submit(DeleteClone(clone=made[0].clone.id))
    runner.run(waiting)
    assert farmed.world.row(waiting).state == "queued"
    assert made[0].is_whole


def test_what_was_never_made_is_a_row(farmed: Farmed) -> None:
    """A failed clone goes with its farm, or alone; a domain and a file of its name stay."""
    farm, (made,) = farmed.farm(1)
    failed = [farmed.row(farm, f"{made.guest.name}-{n}", "failed") for n in (1, 2)]
    stranger = farmed.guest(failed[0].name)
    farmed.done(DeleteClone(clone=failed[0].id))
    assert (stranger.state(), made.is_whole) == ("stopped", True)
    assert farmed.states(farm)[failed[1].name] == "failed"
    farmed.done(DeleteFarm(farm=farm.id))
    assert stranger.state() == "stopped"
    assert set(farmed.states(farm).values()) == {"deleted"}


def test_what_was_deleted_is_not_made_again(farmed: Farmed) -> None:
    """A retry that was asked for while the deletion waited finds what was deleted gone: it makes
    the others, and of a farm of which nothing is left it says so."""
    guest = farmed.guest()
    farmed.source = Server(name=guest.name, host="kvm-1", domain_uuid=guest.domain.UUIDString())
    farmed.world.add(farmed.source)
    farm, _ = farmed.farm(0)
    with transaction() as session:
        command = {**farm.command, "count": 2, "start": False, "identity": "keep"}
        session.get_one(Farm, farm.id).command = command
    rows = [farmed.row(farm, farm.name.format(n=n), "failed") for n in (1, 2)]
    submit = farmed.world.submit

    deletion, retry = submit(DeleteClone(clone=rows[0].id)), submit(RetryFarm(farm=farm.id))
    runner.run(deletion)
    runner.run(retry)

    farmed.adopt(rows[1].name)
    made = farmed.world.row(retry)
    assert made.state == "succeeded", made.error
    assert list(outcomes(made)) == [rows[1].name]
    assert farmed.states(farm) == {rows[0].name: "deleted", rows[1].name: "ready"}
    assert attach(farmed.hypervisor, rows[0].name).state() == "missing"

    last = farmed.row(farm, f"{farm.name.format(n=3)}", "failed")
    deletion, retry = submit(DeleteFarm(farm=farm.id)), submit(RetryFarm(farm=farm.id))
    runner.run(deletion)
    runner.run(retry)

    assert (farmed.world.row(retry).error or {})["code"] == "nothing_to_retry"
    assert farmed.states(farm)[last.name] == "deleted"
    with reading() as session:
        assert session.get_one(Farm, farm.id).deleted_at is not None


def test_forgotten_server_is_its_owner_s(farmed: Farmed) -> None:
    """To forget a clone's server takes its VM out of the farm: deleting that leaves it alone."""
    farm, made = farmed.farm(2)
    with transaction() as session:
        session.get_one(Server, made[0].server.id).forgotten_at = now()
        session.get_one(Clone, made[0].clone.id).state = "deleted"
    farmed.done(DeleteFarm(farm=farm.id))
    assert (made[0].is_whole, made[1].is_gone) == (True, True)


def test_server_that_is_forgotten_while_a_deletion_begins(farmed: Farmed) -> None:
    """Whoever was told that the VM stays keeps it, and it is no clone of the deletion any more."""
    farm, made = farmed.farm(2)
    made[0].guest.start(wait=False)
    with forgotten_before_it_is_held(made[0]):
        ended = farmed.done(DeleteFarm(farm=farm.id))
    assert list(outcomes(ended)) == [made[1].clone.name]
    assert (made[0].is_whole, made[0].guest.state()) == (True, "running")
    assert made[1].is_gone
    with reading() as session:
        assert session.get_one(Farm, farm.id).deleted_at is not None


def test_base_of_a_vm_that_was_kept_stays(farmed: Farmed) -> None:
    """A linked clone whose server was forgotten is its owner's, and stands on the farm's base: that
    is left when the rest of the farm goes, and named. Where nobody needs it, it goes."""
    for kept in (True, False):
        farm, made, base = farmed.linked_farm(2)
        if kept:
            with transaction() as session:
                forgetting.forget(session, session.get_one(Server, made[0].server.id), now())

        ended = farmed.done(DeleteFarm(farm=farm.id))

        assert (made[0].is_whole, made[1].is_gone) == (kept, True)
        assert base.exists() == kept
        left = outcomes(ended)[made[1].clone.name]["left"]
        assert [each["path"] for each in left] == [str(base)] * kept
        assert all(made[0].guest.name in each["reason"] for each in left)


def test_base_that_a_domain_was_defined_on_meanwhile_stays(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who uses a base is looked up before guests are stopped, and once more before it goes."""
    farm, made, base = farmed.linked_farm(1)
    overlay = base.with_name("late.qcow2")
    late: list[Guest] = []

    def point(name: str) -> None:
        if name == "committed" and not late:
            create_overlay(base, "raw", overlay)
            late.append(farmed.guest())
            plug(late[0], overlay, fmt="qcow2")

    monkeypatch.setattr(faults, "point", point)

    farmed.done(DeleteFarm(farm=farm.id))

    assert len(late) == 1
    assert made[0].is_gone
    assert base.exists()


def test_cancel_brings_all_back(farmed: Farmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled before its commit, all clones are whole, and those that ran run."""
    farm, made = farmed.farm(2)
    made[0].guest.start(wait=False)
    operation = farmed.world.submit(DeleteFarm(farm=farm.id))
    monkeypatch.setattr(
        removal.faults,
        "point",
        lambda name: (
            name == "committing" and farmed.world.change(operation, cancel_requested_at=now())
        ),
    )
    runner.run(operation)
    assert farmed.world.row(operation).state == "cancelled"
    farmed.is_tidy()
    assert [each.is_whole for each in made] == [True, True]
    assert [each.guest.state() for each in made] == ["running", "stopped"]


def test_cancel_cuts_no_more_power(farmed: Farmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large farm: those that were not yet off are not touched any more."""
    farm, made = farmed.farm(3)
    for each in made:
        each.guest.start(wait=False)
    boots = [each.guest.domain.ID() for each in made]
    operation = farmed.world.submit(DeleteFarm(farm=farm.id))
    destroy = Domain.destroy

    def destroyed(domain: Domain) -> None:
        destroy(domain)
        farmed.world.change(operation, cancel_requested_at=now())
        lease = farmed.world.row(operation).lease_expires_at
        wait_for(lambda: farmed.world.row(operation).lease_expires_at != lease)
        time.sleep(0.5)  # with that the worker has heard of it

    monkeypatch.setattr(farms, "MOST_CALLS", 1)
    monkeypatch.setattr(Domain, "destroy", destroyed)
    runner.run(operation)

    assert farmed.world.row(operation).state == "cancelled"
    farmed.is_tidy()
    assert [each.guest.state() for each in made] == ["running"] * 3
    after = [each.guest.domain.ID() for each in made]
    assert [new != old for new, old in zip(after, boots, strict=True)] == [True, False, False]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_what_cannot_be_started_again_keeps_no_other_off(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The last one's owner gave it a disk that is not there: the others run again at once, it once
    it can, and then the operation ends."""
    farm, made = farmed.farm(3)
    for each in made:
        each.guest.start(wait=False)
    later = farmed.disks / "later.raw"
    operation = farmed.world.submit(DeleteFarm(farm=farm.id))
    stopped: list[bool] = []

    def point(name: str) -> None:
        if name == "committing":
            stopped.extend(each.guest.state() == "stopped" for each in made)
            plug(made[2].guest, later)
            if how == "failed":
                raise OSError("a mishap")
            farmed.world.change(operation, cancel_requested_at=now())

    monkeypatch.setattr(faults, "point", point)
    runner.run(operation)

    assert stopped == [True] * 3
    assert farmed.world.row(operation).state == "running"
    assert [each.is_whole for each in made] == [True] * 3
    assert [each.guest.state() for each in made] == ["running", "running", "stopped"]
    make_disk(farmed.disks, "raw", "blank", SIZE).rename(later)
    farmed.world.expire(operation)
    runner.run(operation)
    assert farmed.world.row(operation).state == how
    assert [each.guest.state() for each in made] == ["running"] * 3
    farmed.is_tidy()


def test_killed_at_every_point(farmed: Farmed) -> None:
    """Whoever takes it over ends it: both clones are gone, with no trace."""
    farm, _ = farmed.farm(2)
    with passing() as passed:
        assert farmed.done(DeleteFarm(farm=farm.id)).state == "succeeded"
    points = [(name, passed[: n + 1].count(name)) for n, name in enumerate(passed)]
    assert {"farm:held", "removal:aside", "committed", "undo:give_back"} - {*passed} == {
        "undo:give_back"
    }
    assert len(points) > 15
    for name, nth in points:
        farm, made = farmed.farm(2)
        operation = farmed.world.submit(DeleteFarm(farm=farm.id))
        with killed_at(name, nth):
            runner.run(operation)
        if farmed.world.row(operation).state == "running":
            farmed.world.expire(operation)
            runner.run(operation)
        ended: Operation = farmed.world.row(operation)
        assert ended.state == "succeeded", (name, ended.phase, ended.error)
        assert [each.is_gone for each in made] == [True, True], name
        farmed.is_tidy()


def test_two_at_once_delete_once(farmed: Farmed) -> None:
    """Each clone's end is told once, however often it is asked for."""
    farm, made = farmed.farm(2)
    operations = [farmed.world.submit(DeleteFarm(farm=farm.id)) for _ in range(2)]
    at_once(*[lambda: runner.run(operations[0])] * 3)
    runner.run(operations[1])
    assert [farmed.world.row(each).state for each in operations] == ["succeeded"] * 2
    assert len(farmed.world.events("clone.deleted")) == 2
    assert len(farmed.world.events("farm.deleted")) == 1
    assert [each.is_gone for each in made] == [True, True]


def test_volume_of_another_domain_stays(farmed: Farmed) -> None:
    """A disk that another domain has as a storage pool's volume is its disk, too."""
    farm, (made,) = farmed.farm(1)
    folder = farmed.disks / "pool"
    folder.mkdir()
    moved = folder / "disk.raw"
    made.disk.rename(moved)
    with transaction() as session:
        session.get_one(Clone, made.clone.id).files = [str(moved)]
    made.guest.domain.undefine()
    other = farmed.guest(disks=[make_disk(farmed.disks, "raw", "blank", 65536)])
    name = f"{made.guest.name}-pool"
    pool = other.connection.storagePoolCreateXML(
        f"<pool type='dir'><name>{name}</name><target><path>{folder}</path></target></pool>", 0
    )
    try:
        pool.refresh(0)
        other.domain.attachDeviceFlags(
            f"<disk type='volume' device='disk'><source pool='{name}' volume='disk.raw'/>"
            "<target dev='vdb' bus='virtio'/></disk>",
            2,
        )
        ended = farmed.done(DeleteFarm(farm=farm.id))
    finally:
        pool.destroy()
    assert moved.exists()
    assert outcomes(ended)[made.clone.name]["left"][0]["path"] == str(moved)
