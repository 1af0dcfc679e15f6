"""The doctor and libvirt: servers, guests that are held, clones. Real domains, one that runs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from doctor.patient import SIZE, Patient
from sqlalchemy import delete

from lab.guest import Guest, make_disk
from lab.libvirtd import Hypervisor, scratch
from shared import doctor
from shared.database import now, transaction
from shared.hypervisor.connection import forget
from shared.models import Clone, JournalEntry, Server
from shared.settings import settings

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def started(hypervisor: Hypervisor) -> Iterator[Guest]:
    """A guest that boots while the other tests of this module go on."""
    with scratch() as folder, Guest.create(hypervisor, folder, disks=["qcow2"]) as made:
        yield made.start(wait=False)


@pytest.fixture
def running(started: Guest) -> Iterator[Guest]:
    """That guest, running before the test and after it."""
    assert started.state() == "running"
    yield started
    assert started.state() == "running"


def test_healthy_host(patient: Patient, running: Guest) -> None:
    """Copies, a revert that can be undone, a clone, and a guest at rest in a copy at work."""
    guest = patient.guest()
    server, busy = patient.server(guest), patient.server(running)
    patient.reverted(server, guest)
    patient.copy("image", "img_1", server)
    patient.copy("snapshot", "snp_1", server)
    clone(patient, server.name, "ready", server_id=server.id)
    running.domain.suspend()
    with patient.at_work(busy, ("resume_domain", {"uuid": busy.domain_uuid})):
        patient.is_healthy()
    running.domain.resume()


def test_server_whose_domain_is_gone(patient: Patient) -> None:
    """Whether it comes back from an image or is forgotten is a person's to say."""
    lost = Server(name="web", host="kvm-1", domain_uuid=str(uuid4()))
    patient.world.add(lost)

    patient.leaves("server", f"web ({lost.id})", lost.domain_uuid, "restore", "server forget web")


@pytest.mark.usefixtures("any_database")
def test_guest_that_a_dead_worker_paused_is_given_back(patient: Patient, running: Guest) -> None:
    """The journal tells it from one that its owner paused; its operation is cleared up too."""
    server = patient.server(running)
    running.domain.suspend()
    patient.is_healthy()
    step = ("resume_domain", {"uuid": server.domain_uuid})
    operation = patient.abandoned(server, ("remove_file", {"path": "/nonexistent-file"}), step)

    guest, work = doctor.examine()

    assert (guest.check, guest.subject) == ("guest", running.name)
    assert (work.check, work.subject) == ("operation", operation)
    assert f"paused by operation {operation}" in guest.detail
    assert running.state() == "paused"
    doctor.repair([guest])
    assert (running.state(), guest.fixed) == ("running", True)
    patient.mends("operation", operation, "not undone: remove_file")


def test_guest_that_could_not_be_given_back_before(patient: Patient, running: Guest) -> None:
    """An operation that libvirt's absence left half undone, with no owner, is played once more."""
    server = patient.server(running)
    running.domain.suspend()
    step = ("resume_domain", {"uuid": server.domain_uuid})
    operation = patient.abandoned(server, step, owner=None)
    patient.world.expire(operation)

    found = doctor.examine()
    doctor.repair(found)

    assert [(each.check, each.fixed) for each in found] == [("guest", True), ("operation", True)]
    patient.is_healthy()


def test_backup_job_for_nobody_is_ended(patient: Patient, running: Guest) -> None:
    """One that writes into the vault and is no operation's; those of others go on."""
    server = patient.server(running)
    partial = patient.vault.folder("image", server.id, "img_1").with_name("img_1.partial")
    partial.mkdir(parents=True)
    for folder in (partial, *partial.parents[:2]):
        folder.chmod(0o711)
    begin_backup(running, patient.disks / "elsewhere")
    with patient.at_work(server, ("remove_copy", {"folder": str(partial.with_suffix(""))})):
        patient.is_healthy()
        running.domain.abortJob()
        begin_backup(running, partial / "vda.qcow2")
        patient.is_healthy()
    patient.world.change(patient.world.woken()[0], state="failed")
    forget_journal()

    job, folder = doctor.examine()

    assert [(job.check, job.subject), (folder.check, folder.subject)] == [
        ("guest", running.name),
        ("leftover", f"images/{server.id}/img_1.partial"),
    ]
    doctor.repair([job, folder])
    assert (job.fixed, folder.fixed) == (True, True)
    assert running.domain.jobStats().get("type", 0) == 0
    patient.is_healthy()


def begin_backup(guest: Guest, scratch_file: Path) -> None:
    """A job that lasts until it is ended: it waits for somebody to read from its socket."""
    socket = f"/tmp/{uuid4().hex}.nbd"  # noqa: S108  as long as QEMU's user may make it
    guest.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch_file}'/></disk>"
        "</disks></domainbackup>",
        None,
    )


def forget_journal() -> None:
    with transaction() as session:
        session.execute(delete(JournalEntry))


def test_domain_on_files_that_are_to_go(patient: Patient) -> None:
    """A copy as a disk would be written to, one that is set aside would vanish under it."""
    server = patient.server()
    copy = patient.copy("image", "img_1", server)
    (copy / "vda.raw").chmod(0o400)
    used = patient.guest(disk=copy / "vda.raw")
    patient.leaves("guest", used.name, f"vda is {copy}/vda.raw", f"virsh edit {used.name}")
    used.domain.undefine()
    aside = patient.disks / ".triptych-op_1"
    aside.mkdir()
    used = patient.guest(disk=make_disk(aside, "raw", "blank", SIZE, "old-web.raw"))

    found = {each.check: each for each in doctor.examine()}

    assert set(found) == {"guest", "set aside"}
    assert "keeps aside" in found["guest"].detail
    assert found["guest"].repair is found["set aside"].repair is None


def test_disk_of_a_domain_is_not_removed_with_what_is_around_it(patient: Patient) -> None:
    """Whoever put a domain on a half-made copy, or on what a revert kept, keeps that disk."""
    guest = patient.guest()
    server = patient.server(guest)
    partial = patient.vault.folder("image", server.id, "img_1").with_name("img_1.partial")
    partial.mkdir(parents=True)
    patient.guest(disk=make_disk(partial, "raw", "blank", SIZE, "vda.raw"))
    over = {"undo_until": now() - timedelta(hours=1)}
    operation, folder = patient.reverted(server, guest, **over)
    (old,) = folder.iterdir()
    patient.guest(disk=old)

    for unpromised in ({}, {"undo": None, "undo_until": None}):
        patient.world.change(operation.id, **{"phase": "succeeded", **unpromised})
        found = doctor.examine()
        doctor.repair(found)

        named = {each.check: each.subject for each in found}
        assert named["leftover"] == f"images/{server.id}/img_1.partial"
        assert named["set aside"] == str(folder)
        assert [each.fixed for each in found] == [False] * 4
        assert ((partial / "vda.raw").exists(), old.exists()) == (True, True)


def clone(patient: Patient, name: str, state: str, **fields: Any) -> Clone:
    made = Clone(
        operation_id="op_over",
        host="kvm-1",
        name=name,
        source_kind="server",
        source_id="srv_1",
        state=state,
        **fields,
    )
    patient.world.add(made)
    return made


def test_clone_that_is_ready_and_gone(patient: Patient) -> None:
    """Named as the clone that it is, with both ways to go on."""
    lost = Server(name="qa-1", host="kvm-1", domain_uuid=str(uuid4()))
    patient.world.add(lost)
    made = clone(patient, "qa-1", "ready", server_id=lost.id)

    patient.leaves("clone", f"qa-1 ({made.id})", "no domain", "triptych server forget qa-1")


def test_what_is_left_of_clones_that_were_not_made(patient: Patient) -> None:
    """Domain and disks are named and stay: only the name says whose they are."""
    patient.guest()
    disk = make_disk(patient.disks, "raw", "blank", SIZE, "qa-1-vda.raw")
    guest = patient.guest("qa-1", disk)
    taken = {"code": "clone_name_taken"}
    clone(patient, "qa-1", "failed", error=taken)
    patient.is_healthy()
    failed = clone(patient, "qa-1", "cancelled")
    patient.leaves("clone", f"qa-1 ({failed.id})", "a domain of that name", "virsh undefine")

    guest.domain.undefine()
    patient.leaves("clone", f"qa-1 ({failed.id})", str(disk), "remove what nobody uses")
    assert disk.exists()
    disk.unlink()
    patient.is_healthy()


def test_clones_that_were_deleted(patient: Patient) -> None:
    """One that was made and deleted is no finding, though a domain of that name is there by now.
    What is left of one that was never made is named also when its farm is deleted since."""
    gone = Server(name="qa-1", host="kvm-1", domain_uuid=str(uuid4()), forgotten_at=now())
    patient.world.add(gone)
    clone(patient, "qa-1", "deleted", server_id=gone.id)
    disk = make_disk(patient.disks, "raw", "blank", SIZE, "qa-1-vda.raw")
    patient.guest("qa-1", disk)
    patient.is_healthy()

    left = make_disk(patient.disks, "raw", "blank", SIZE, "qa-2-vda.raw")
    never = clone(patient, "qa-2", "deleted")
    patient.leaves("clone", f"qa-2 ({never.id})", str(left), "remove what nobody uses")
    left.unlink()


def test_libvirt_that_is_away_is_said_once(
    patient: Patient, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guests cannot be looked at then; all else is, and is repaired."""
    server = patient.server()
    patient.copy("image", "img_1", server, row=False)
    monkeypatch.setenv("TRIPTYCH_LIBVIRT_URI", "qemu+unix:///system?socket=/nonexistent")
    settings.cache_clear()

    away, copy = doctor.examine()
    doctor.repair([away, copy])

    assert (away.check, away.subject) == ("libvirt", settings().libvirt_uri)
    assert (away.fixed, copy.fixed) == (False, True)
    assert "does not answer" in away.detail
    assert "\n" not in away.line()
    forget(hypervisor.uri)


def test_guest_that_a_dead_worker_froze_is_thawed(patient: Patient, running: Guest) -> None:
    """The journal says that it may be frozen; nobody else could."""
    server = patient.server(running)
    running.wait_ready()
    running.domain.fsFreeze()
    step = ("thaw_domain", {"uuid": server.domain_uuid})
    operation = patient.abandoned(server, step)

    found = doctor.examine()
    assert running.agent("guest-fsfreeze-status") == "frozen"
    doctor.repair(found)

    assert [(each.check, each.fixed) for each in found] == [("guest", True), ("operation", True)]
    assert f"perhaps frozen by operation {operation}" in found[0].detail
    assert running.agent("guest-fsfreeze-status") == "thawed"
    patient.is_healthy()
