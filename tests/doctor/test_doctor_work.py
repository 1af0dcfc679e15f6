"""The doctor, operations whose worker is dead, and what reverts set aside."""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from doctor.patient import SIZE, Patient
from operations.spine import forget_caches

from lab.guest import make_disk
from shared import admin, doctor
from shared.database import now, transaction
from shared.disks import setaside
from shared.models import Host
from shared.operations import presence
from shared.settings import settings

pytestmark = pytest.mark.vm


@pytest.mark.usefixtures("any_database")
def test_operation_without_a_worker_is_undone_and_left_to_the_next_one(patient: Patient) -> None:
    """As a successor does it: by the journal; then a worker is woken to begin again."""
    made = patient.disks / "half-made.raw"
    made.touch()
    operation = patient.abandoned(patient.server(), ("remove_file", {"path": str(made)}))
    patient.world.clear_outbox()

    patient.mends("operation", operation, "snapshot.take", "not undone: remove_file")

    row = patient.world.row(operation)
    assert not made.exists()
    assert (row.state, row.owner, row.attempt) == ("running", None, 1)
    assert patient.world.woken() == [operation]


@pytest.mark.parametrize("side", ["undo", "redo"])
def test_operation_without_a_worker_is_ended_where_that_is_all(patient: Patient, side: str) -> None:
    """In its last attempt it fails; past its commit what is left is done and it succeeds."""
    made = patient.disks / "left.raw"
    made.touch()
    values = {"attempt": 3} if side == "undo" else {"committed": True}
    step = ("remove_file", {"path": str(made)})
    operation = patient.abandoned(patient.server(), step, **values)

    patient.mends("operation", operation, f"not {'undone' if side == 'undo' else 'done'}")

    state = patient.world.row(operation).state
    assert (state, made.exists()) == ("failed" if side == "undo" else "succeeded", False)


def test_operation_that_cannot_be_undone_yet_stays(patient: Patient) -> None:
    """Whatever is in the way is said, and the server stays locked until it is out of it."""
    made = patient.disks / "a-directory"
    made.mkdir()
    operation = patient.abandoned(patient.server(), ("remove_file", {"path": str(made)}))

    (found,) = doctor.examine()
    doctor.repair([found])

    assert not found.fixed
    (again,) = doctor.examine()
    assert (again.subject, "IsADirectoryError" in again.detail) == (operation, True)
    assert patient.world.row(operation).phase == "recovering"


def test_operation_that_is_at_work_is_left_alone(patient: Patient) -> None:
    """Its worker's lock is asked for, and so it is again before anything is repaired."""
    made = patient.disks / "half-made.raw"
    made.touch()
    server = patient.server()
    with patient.at_work(server, ("remove_file", {"path": str(made)})) as operation:
        patient.world.expire(operation, seconds=-600)  # nobody renews its lease here
        patient.is_healthy()
        owner = patient.world.row(operation).owner
        patient.world.change(operation, owner="kvm-1/snapshotter/another")
        assert doctor.examine() == []  # no file of that worker: it may be another host's
        (presence.folder() / "kvm-1~snapshotter~another").touch()
        (early,) = doctor.examine()
        patient.world.change(operation, owner=owner)
        doctor.repair([early])

        assert made.exists()
        assert patient.world.row(operation).owner == owner


# Set aside


def test_what_can_be_undone_no_more_is_removed(patient: Patient) -> None:
    """Its time is over and beat has not come: the promise goes, then the files; the disk stays."""
    guest = patient.guest()
    operation, folder = patient.reverted(
        patient.server(guest), guest, undo_until=now() - timedelta(hours=1)
    )

    patient.mends("set aside", operation.id, "was over at", "whether beat runs")

    row = patient.world.row(operation.id)
    assert (row.undo, row.undo_until, folder.exists()) == (None, None, False)
    assert guest.disks[0].read_bytes().startswith(b"reverted")


def test_what_can_be_undone_is_kept_whatever_the_finding_was(patient: Patient) -> None:
    """Found when its time was over, and given more before the repair: nothing is removed.
    Nor where its undo has been asked for meanwhile."""
    guest = patient.guest()
    server = patient.server(guest)
    operation, folder = patient.reverted(server, guest, undo_until=now() - timedelta(hours=1))
    (early,) = doctor.examine()
    asked = patient.world.snapshot_of(server)

    doctor.repair([early])

    assert (early.fixed, folder.is_dir()) == (False, True)
    assert patient.world.row(operation.id).undo
    patient.world.change(asked, state="cancelled", finished_at=now())
    patient.world.change(operation.id, undo_until=now() + timedelta(hours=1))
    doctor.repair([early])
    assert (early.fixed, folder.is_dir()) == (False, True)
    patient.is_healthy()


def test_undo_that_has_lost_its_file(patient: Patient) -> None:
    """To undo would leave disks of two instants; nothing but the file itself mends that."""
    guest = patient.guest()
    operation, folder = patient.reverted(patient.server(guest), guest)
    (old,) = folder.iterdir()
    old.unlink()

    patient.leaves("set aside", operation.id, str(old), "is gone", "do not undo it")


def test_files_of_an_operation_that_promises_nothing_are_removed(patient: Patient) -> None:
    """Undone, forgotten or failed: its directory goes, and a disk that is nowhere else is put
    back to its place first."""
    guest = patient.guest()
    ended = {"undo": None, "undo_until": None}
    operation, folder = patient.reverted(patient.server(guest), guest, **ended)
    (disk,) = guest.disks
    patient.mends("set aside", str(folder), operation.id, "cannot be undone")
    assert (folder.exists(), disk.read_bytes()[:8]) == (False, b"reverted")

    os.renames(disk, folder / f"old-{disk.name}")
    patient.mends("set aside", str(folder), operation.id, "cannot be undone")
    assert (folder.exists(), disk.read_bytes()[:8]) == (False, b"reverted")


def test_what_was_set_aside_of_a_tpm_is_found(patient: Patient) -> None:
    """It lies in libvirt's directory, where no disk is."""
    guest = patient.guest()
    ended = {"undo": None, "undo_until": None}
    operation, beside_disks = patient.reverted(patient.server(guest), guest, **ended)
    shutil.rmtree(beside_disks)
    folder = settings().swtpm / guest.domain.UUIDString() / "tpm2" / beside_disks.name
    folder.mkdir(parents=True)
    (folder / "old-tpm2-00.permall").touch()

    patient.mends("set aside", str(folder), operation.id, "cannot be undone")

    assert not folder.exists()


def test_set_aside_files_that_only_a_person_can_judge(patient: Patient) -> None:
    """Those of an operation that nobody knows or whose outcome a restored database lost, and
    what somebody else put there: an old disk may be the one that is wanted."""
    guest = patient.guest()
    server = patient.server(guest)
    unknown = patient.disks / ".triptych-op_unknown"
    unknown.mkdir()
    make_disk(unknown, "raw", "blank", SIZE, "old-web.raw")
    patient.leaves("set aside", str(unknown), "no such operation", "look whether")
    shutil.rmtree(unknown)

    lost = {"undo": None, "undo_until": None, "error": {"code": "database_restored"}}
    _, folder = patient.reverted(server, guest, state="failed", **lost)
    patient.leaves("set aside", str(folder), "what it did is lost", "look whether")
    shutil.rmtree(folder)

    over = {"undo": None, "undo_until": None}
    _, folder = patient.reverted(server, guest, **over)
    (folder / "notes.txt").write_text("mine")
    patient.leaves("set aside", str(folder), "notes.txt", "move that elsewhere")


def test_directory_of_a_revert_that_is_at_work_is_left_alone(patient: Patient) -> None:
    """Also that of one whose undo has yet to remove it, by the journal of another operation."""
    guest = patient.guest()
    server = patient.server(guest)
    (disk,) = guest.disks
    operation, folder = patient.reverted(server, guest, undo=None, undo_until=None)
    arguments = {"live": {"vda": str(disk)}, "operation_id": operation.id}
    with patient.at_work(server, ("discard_set_aside", arguments)) as running:
        setaside.prepare({"vda": disk}, running)["vda"].touch()

        patient.is_healthy()

    assert folder.is_dir()


# The command


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["triptych-admin", "doctor", *words])
    return admin.main(), capsys.readouterr().out


def test_command_tells_what_differs_and_what_it_did(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each finding with its remedy, a summary, and whether something is left."""
    assert run(monkeypatch, capsys) == (0, "nothing differs\n")
    assert run(monkeypatch, capsys, "--json") == (0, "[]\n")
    server = patient.server()
    patient.copy("image", "img_1", server, row=False)
    path = f"images/{server.id}/img_1"

    told = f"copy: {path}: it has no row. --fix adds the row.\n"
    assert run(monkeypatch, capsys) == (
        1,
        f"to fix   {told}1 difference, 1 of which --fix repairs\n",
    )
    status, printed = run(monkeypatch, capsys, "--json")
    told_as_json = {
        "check": "copy",
        "subject": path,
        "detail": "it has no row",
        "remedy": "--fix adds the row",
        "fixed": False,
    }
    assert (status, json.loads(printed)) == (1, [told_as_json])
    assert run(monkeypatch, capsys, "--fix") == (
        0,
        f"fixed    {told}1 difference, 1 fixed, 0 left\n",
    )
    assert run(monkeypatch, capsys, "--fix") == (0, "nothing differs\n")
    shutil.rmtree(patient.copy("snapshot", "snp_1", server))
    status, printed = run(monkeypatch, capsys, "--fix")
    assert (status, printed.splitlines()[-1]) == (1, "1 difference, 0 fixed, 1 left")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://triptych:secret@127.0.0.1:1/triptych",
        "sqlite:///{}/none/triptych.db",
        "sqlite:///{}/empty.db",
        "sqlite:///{}/noise.db",
    ],
    ids=["silent", "not there", "without tables", "no database"],
)
def test_database_that_is_away_is_one_line(
    patient: Patient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    url: str,
) -> None:
    """Neither a traceback nor the password; nothing else can be compared then."""
    before = os.environ["TRIPTYCH_DATABASE_URL"]
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", url.format(tmp_path))
    (tmp_path / "empty.db").touch()
    (tmp_path / "noise.db").write_bytes(b"noise" * 1000)
    forget_caches()
    try:
        status, printed = run(monkeypatch, capsys, "--fix")
    finally:
        monkeypatch.setenv("TRIPTYCH_DATABASE_URL", before)
        forget_caches()

    first, summary = printed.splitlines()
    assert (status, summary) == (1, "1 difference, 0 fixed, 1 left")
    assert first.startswith("by hand  database: ")
    assert "secret" not in printed
    assert not (tmp_path / "none").exists()


def test_another_vault_than_the_workers_is_not_examined(patient: Patient) -> None:
    """There every copy would look gone and every worker dead, and --fix would act on that."""
    operation = patient.abandoned(patient.server())
    shutil.rmtree(patient.vault.root / ".workers")
    patient.leaves("vault", str(patient.vault.root), "its worker's lock is not here")
    patient.world.change(operation, state="failed", finished_at=now())
    with transaction() as session:
        host = session.get_one(Host, "kvm-1")
        host.facts = {"vault": "/srv/triptych"}
    patient.leaves("vault", str(patient.vault.root), "at /srv/triptych", "TRIPTYCH_VAULT")
    shutil.rmtree(patient.vault.root)
    patient.leaves("vault", str(patient.vault.root), "no directory")
