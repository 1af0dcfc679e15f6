"""What the doctor finds of the bases that linked clones stand on."""

from datetime import timedelta
from typing import Any

from doctor.patient import Patient

from shared.commands import TakeSnapshot
from shared.database import now
from shared.disks.overlays import base_path
from shared.linked import STOOD_ON
from shared.models import Clone
from shared.settings import settings


def linked(patient: Patient, *paths: Any, **fields: Any) -> Clone:
    """A clone that is ready and stands on these."""
    server = patient.server()
    clone = Clone(
        operation_id="op_1",
        host=settings().host,
        name="qa-1",
        server_id=server.id,
        source_kind="server",
        source_id=server.id,
        linked_to=[str(path) for path in paths],
        **{"state": "ready", **fields},
    )
    patient.world.add(clone)
    return clone


def test_a_base_that_clones_stand_on_is_as_it_should_be(patient: Patient) -> None:
    """Also one that an operation is making."""
    base = base_path(patient.disks, "op_1", "vda", "raw")
    base.write_text("base")
    clone = linked(patient, base)
    patient.is_healthy()

    coming = base_path(patient.disks, "op_2", "vda", "raw")
    coming.write_text("base")
    server = patient.server()
    with patient.at_work(server, ("remove_file", {"path": str(coming)})):
        patient.is_healthy()
    coming.unlink()

    base.unlink()
    patient.finds("base", f"{clone.name} ({clone.id})", str(base), "gone")


def test_a_base_that_is_kept_for_an_undo_is_as_it_should_be(patient: Patient) -> None:
    """What a revert set aside stands on it."""
    base = base_path(patient.disks, "op_1", "vda", "raw")
    base.write_text("base")
    clone = linked(patient)
    assert clone.server_id
    revert = patient.world.submit(TakeSnapshot(server=clone.server_id))
    kept = {"live": {}, "previous": None, "missing": [], STOOD_ON: [str(base)]}
    until = now() + timedelta(hours=1)
    patient.world.change(revert, state="succeeded", undo=kept, undo_until=until)
    patient.is_healthy()


def test_a_base_that_nobody_stands_on_is_told(patient: Patient) -> None:
    """It is left where it is."""
    base = base_path(patient.disks, "op_1", "vda", "raw")
    base.write_text("base")
    linked(patient, base, state="deleted")
    patient.leaves("base", str(base), "no clone")
