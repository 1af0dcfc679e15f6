"""Ending the save of a guest's memory, so that the guest lives.

Where the last part of a save is cancelled of a guest that runs, QEMU goes on with its images
inactive, and dies of the next write or save (7.2, block.c: the assertion in
bdrv_inactivate_recurse). A resume makes them active. So the guest is held first, by us, and a note
beside the locks says so, for whoever has to go on: an owner's pause looks the same, and stays.
"""

import contextlib
from pathlib import Path
from typing import Any

import libvirt

from shared.hypervisor.domains import ASKED_FOR, HELD_BY_SAVE

STILLED = ".stilled"
"""What the names of files end with, beside the locks, that name domains that we have paused."""


STEP_S = 0.005
"""From one step of an end to the next: the guest is held meanwhile."""
_stilled: set[Path] = set()
"""Notes of this process: one may find no room for its file, and another may take that away."""


def note_of(holds: Path, uuid: str) -> Path:
    return holds / f"{uuid}{STILLED}"


def is_stilled(note: Path) -> bool:
    """Whether the domain was paused in order to end a save."""
    with contextlib.suppress(OSError):  # the vault's file system fails
        return note in _stilled or note.exists()
    return False


def forget(note: Path) -> None:
    """It runs, and whoever pauses it from now on is its owner."""
    _stilled.discard(note)
    with contextlib.suppress(OSError):
        note.unlink(missing_ok=True)


def still(handle: Any, note: Path) -> None:
    """Pause the domain in order to end a save of it. Raises libvirt.libvirtError."""
    _stilled.add(note)
    with contextlib.suppress(OSError):
        note.touch()
    handle.suspend()


def wake(handle: Any, note: Path) -> None:
    """Make the images of a running domain active, of which somebody may have cancelled a save: so
    does libvirt when it starts again. Nothing while there is a job, in which libvirt resumes
    nobody; what a call began that broke off, the next one ends. Raises libvirt.libvirtError."""
    if handle.jobStats().get("type", libvirt.VIR_DOMAIN_JOB_NONE):
        return
    if handle.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
        still(handle, note)
    if is_stilled(note):
        handle.resume()
        forget(note)


def saving(stats: dict[str, Any]) -> bool:
    """Whether a domain's job, of these statistics, is the save of its memory in a snapshot."""
    ours = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT
    return bool(ours and stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE))


def end_save(handle: Any, note: Path) -> bool | None:
    """One step towards a domain without a save, and that is not paused by one or by us. None: look
    again in a moment; True: it was resumed; False: there is nothing to do.

    Whoever calls may die, or another come in between: the next step is the same. Raises
    libvirt.libvirtError.
    """
    if not handle.isActive():
        forget(note)
        return False
    if saving(handle.jobStats()):
        state, reason = handle.state()
        with contextlib.suppress(libvirt.libvirtError):  # it has just ended, or gone down
            if state == libvirt.VIR_DOMAIN_RUNNING:
                still(handle, note)
            elif not (state == libvirt.VIR_DOMAIN_PAUSED and reason in HELD_BY_SAVE):
                handle.abortJob()
        return None  # what is paused by the save itself is at its last part
    state, reason = handle.state()
    ours = reason in HELD_BY_SAVE or (reason in ASKED_FOR and is_stilled(note))
    if state != libvirt.VIR_DOMAIN_PAUSED or not ours:
        _stilled.discard(note)  # the file stays: a pause of one that died may be on its way
        return False
    handle.resume()
    forget(note)
    return True
