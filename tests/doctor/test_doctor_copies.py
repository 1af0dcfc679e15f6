"""The doctor and the vault: copies and rows, manifests and files, folders that are no copies."""

from __future__ import annotations

import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
from doctor.patient import Patient, seal, writable
from operations.spine import python
from sqlalchemy import select

from shared import doctor, lookups
from shared.database import now, transaction
from shared.doctor import copies, leftovers
from shared.manifest import Manifest, read_manifest, write_manifest
from shared.models import Event, Image, Server, Snapshot

pytestmark = pytest.mark.vm


def states(model: Any = Image) -> dict[str, str]:
    with transaction() as session:
        return {each.id: getattr(each, "state", "there") for each in session.scalars(select(model))}


@pytest.mark.usefixtures("any_database")
def test_copy_without_a_row_gets_it(patient: Patient) -> None:
    """What the rescan would add, --fix adds."""
    server = patient.server()
    patient.copy("image", "img_1", server, row=False)

    patient.mends("copy", f"images/{server.id}/img_1", "no row")

    assert states() == {"img_1": "complete"}


def test_others_write_while_the_vault_is_read(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transaction is open while it looks, nor while it reads once more to add the rows."""
    server = patient.server()
    patient.copy("image", "img_1", server, row=False)
    reads = []

    def read(folder: Path) -> Manifest:
        patient.world.add(Event(type="test.written"))
        reads.append(folder)
        return read_manifest(folder)

    monkeypatch.setattr("shared.rescan.read_manifest", read)
    patient.mends("copy", f"images/{server.id}/img_1", "no row")

    with transaction() as session:
        written = [each for each in session.scalars(select(Event)) if each.type == "test.written"]
    assert len(written) == len(reads) > 2


@pytest.mark.usefixtures("any_database")
def test_image_without_a_folder_is_marked_until_it_is_back(patient: Patient) -> None:
    """Its row says missing afterwards; once the folder is back, that is found too."""
    server = patient.server()
    folder = patient.copy("image", "img_1", server)
    patient.copy("image", "img_2", server)
    elsewhere = folder.rename(patient.disks / "img_1")

    patient.mends("copy", f"images/{server.id}/img_1", "folder is gone")

    assert states() == {"img_1": "missing", "img_2": "complete"}
    elsewhere.rename(folder)
    patient.mends("copy", f"images/{server.id}/img_1", "it is there", "verify")
    assert states() == {"img_1": "complete", "img_2": "complete"}


def test_snapshot_without_a_folder_is_a_persons_to_delete(patient: Patient) -> None:
    """Its row stays: with that gone, a folder that was only moved would be nobody's."""
    server = patient.server()
    shutil.rmtree(patient.copy("snapshot", "snp_1", server))
    patient.copy("image", "img_1", server)

    patient.leaves("copy", f"snapshots/{server.id}/snp_1", "triptych snapshot delete")

    assert states(Snapshot) == {"snp_1": "there"}


def test_vault_that_is_not_mounted_marks_nothing(patient: Patient) -> None:
    """Where all copies are gone at once, their file system is what is missing."""
    server = patient.server()
    for each in ("img_1", "img_2"):
        shutil.rmtree(patient.copy("image", each, server))

    patient.leaves("copy", str(patient.vault.root), "2 copies", "mount")

    assert set(states().values()) == {"complete"}


def damage_manifest(folder: Path) -> None:
    manifest = writable(folder / "manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-20])
    seal(manifest)


def lose_disk(folder: Path) -> None:
    (folder / "vda.raw").unlink()


def truncate_disk(folder: Path) -> None:
    with writable(folder / "vda.raw").open("r+b") as file:
        file.truncate(0)
    seal(folder / "vda.raw")


def swap_for_a_smaller_qcow2(folder: Path) -> None:
    disk, manifest = writable(folder / "vda.raw"), read_manifest(folder)
    header = b"QFI\xfb" + bytes(20) + struct.pack(">Q", 256)
    disk.write_bytes(header)
    seal(disk)
    disks = [each.model_copy(update={"format": "qcow2"}) for each in manifest.disks]
    write_manifest(folder, manifest.model_copy(update={"disks": disks}))


def take_anothers_manifest(folder: Path) -> None:
    write_manifest(folder, read_manifest(folder).model_copy(update={"id": "img_other"}))


def change_manifest(folder: Path) -> None:
    manifest = writable(folder / "manifest.json")
    manifest.write_text(manifest.read_text().replace("raw", "row"))
    seal(manifest)


DAMAGE = [
    (damage_manifest, "Manifest"),
    (change_manifest, "its seal does not fit"),
    (lose_disk, "vda.raw is missing"),
    (truncate_disk, "vda.raw has 0 bytes, the manifest says 512"),
    (swap_for_a_smaller_qcow2, "vda.raw has 256 bytes, the manifest says 512"),
    (take_anothers_manifest, "that of image img_other"),
]


def test_image_that_is_not_what_its_manifest_says(patient: Patient) -> None:
    """It is marked damaged, so that nothing is restored from it, and its files stay."""
    server = patient.server()
    for number, (damage, told) in enumerate(DAMAGE):
        folder = patient.copy("image", f"img_{number}", server, name=damage.__name__)
        damage(folder)
        before = sorted(each.name for each in folder.iterdir())

        patient.mends("copy", f"images/{server.id}/img_{number}", told)

        assert states()[f"img_{number}"] == "damaged"
        assert sorted(each.name for each in folder.iterdir()) == before


def test_copy_of_another_host_is_told_of_and_left(patient: Patient) -> None:
    """Its row is that host's, whose own copy is whole: this one's lost disk says nothing of it."""
    server = patient.server()
    lose_disk(patient.copy("image", "img_1", server))
    with transaction() as session:
        lookups.reporting_host(session, "kvm-9")
        session.get_one(Server, server.id).host = "kvm-9"

    patient.leaves("copy", f"images/{server.id}/img_1", "it is of host kvm-9", "own host's vault")

    assert states() == {"img_1": "complete"}


def test_what_only_a_person_can_decide_about_copies(patient: Patient) -> None:
    """A damaged snapshot, a folder that explains nothing, one that the database says is deleted,
    and a second snapshot: each names what to do, and no whole copy goes."""
    first, second, third = (patient.server() for _ in range(3))
    lose_disk(patient.copy("snapshot", "snp_1", first))
    patient.leaves("copy", f"snapshots/{first.id}/snp_1", "put it back", "snapshot delete")
    shutil.copytree(Path(__file__).parent, patient.vault.folder("image", first.id, "img_0"))
    with transaction() as session:
        row = session.get_one(Snapshot, "snp_1")
        row.deleted_at = now()
    shutil.rmtree(patient.vault.folder("snapshot", first.id, "snp_1"))
    found = {each.subject: each for each in doctor.examine() if "not closed" not in each.detail}
    odd = found.pop(f"images/{first.id}/img_0")
    assert (odd.repair, found) == (None, {})
    assert "restore-without-triptych" in odd.remedy
    shutil.rmtree(patient.vault.folder("image", first.id, "img_0"))

    patient.copy("image", "img_1", second)
    with transaction() as session:
        session.get_one(Image, "img_1").deleted_at = now()
    patient.leaves("copy", f"images/{second.id}/img_1", "it was deleted at", "remove the folder")
    shutil.rmtree(patient.vault.folder("image", second.id, "img_1"))

    patient.copy("snapshot", "snp_2", third)
    patient.copy("snapshot", "snp_3", third, row=False)
    patient.leaves("copy", f"snapshots/{third.id}/snp_3", "another snapshot", "delete one")


def test_check_that_is_stopped_does_not_stop_the_others(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it met is one line; what comes after it is found all the same."""
    server = patient.server()
    patient.copy("image", "img_1", server, row=False)
    patient.vault.folder("image", server.id, "img_2").with_name("img_2.partial").mkdir()

    def refuse(site: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/srv/triptych")
        yield

    refuse.__module__ = copies.__name__
    monkeypatch.setattr(doctor, "_OF_THE_REST", (refuse, leftovers.differences))
    stopped, leftover = doctor.examine()

    assert (stopped.check, leftover.check) == ("copies", "leftover")
    assert "Permission denied" in stopped.detail


def test_copies_are_closed_again(patient: Patient) -> None:
    """Files that somebody made writable, and a folder that others may enter (S3)."""
    server = patient.server()
    folder = patient.copy("image", "img_1", server)
    (folder / "vda.raw").chmod(0o644)
    folder.chmod(0o755)

    patient.mends("copy", f"images/{server.id}/img_1", "vda.raw 0644", "img_1 0755")

    assert folder.stat().st_mode & 0o7777 == 0o700
    assert {each.stat().st_mode & 0o7777 for each in folder.iterdir()} == {0o400}


def test_folders_that_nobody_is_at_are_removed(patient: Patient) -> None:
    """Half-made, half-removed, both at once, and the source of clones that are long made."""
    server = patient.server()
    whole = patient.copy("image", "img_1", server)
    for name in ("img_2.partial", "img_3.deleting", "img_4.partial.deleting"):
        shutil.copytree(whole, whole.with_name(name))
        patient.mends("leftover", f"images/{server.id}/{name}", "no operation")
    farm = patient.copy("farm", "op_over", server, row=False)
    patient.mends("leftover", f"farms/{server.id}/op_over", "no operation")

    assert [each.name for each in whole.parent.iterdir()] == ["img_1"]
    assert not farm.exists()


def test_folder_that_the_database_counts_as_a_copy_is_not_removed(patient: Patient) -> None:
    """Renamed by hand, it may be whole: the last trace of a copy is not what --fix removes."""
    server = patient.server()
    folder = patient.copy("image", "img_1", server)
    patient.copy("image", "img_2", server)
    with transaction() as session:
        session.get_one(Image, "img_1").state = "missing"
    folder.rename(folder.with_name("img_1.deleting"))

    patient.leaves("leftover", f"images/{server.id}/img_1.deleting", "rename it to img_1")


@pytest.mark.usefixtures("any_database")
def test_folder_of_a_living_operation_is_left_alone(patient: Patient) -> None:
    """Neither found, nor removed by a repair that was decided upon before it was made."""
    server = patient.server()
    partial = patient.vault.folder("image", server.id, "img_1").with_name("img_1.partial")
    partial.mkdir(parents=True)
    (early,) = doctor.examine()
    step = ("remove_copy", {"folder": str(partial.with_suffix(""))})
    with patient.at_work(server, step):
        patient.is_healthy()
        doctor.repair([early])

    assert partial.is_dir()
    assert not early.fixed
    assert "left alone" in early.remedy


DIES = """
import os, signal, sys
from pathlib import Path
from shared import recovery
from shared.operations import claim, journal, presence
from shared.database import transaction
operation, folder = sys.argv[1:]
with presence.attempt("snapshotter") as owner:
    assert claim.claim(operation, owner)
    with transaction() as session:
        journal.write(session, operation, "undo", "remove_copy", folder=folder)
    Path(folder + ".partial").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_that_was_killed_is_cleared_up_after(patient: Patient) -> None:
    """Its folder goes by its own journal, and a worker is woken to begin again."""
    server = patient.server()
    operation = patient.world.snapshot_of(server)
    folder = patient.vault.folder("snapshot", server.id, "snp_1")
    with python(DIES, operation, str(folder)) as process:
        assert process.wait(120) == -signal.SIGKILL, process.stderr and process.stderr.read()
    patient.world.clear_outbox()
    assert folder.with_name("snp_1.partial").is_dir()

    patient.mends("operation", operation, "worker is gone", "remove_copy")

    assert not folder.with_name("snp_1.partial").exists()
    assert (patient.world.row(operation).state, patient.world.woken()) == ("running", [operation])
