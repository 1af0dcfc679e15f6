"""The journal's actions on the world: what undoes or completes a step, callable after a crash.

Each tolerates that its step never happened, or that it was carried out already.
"""

import errno
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

from shared import faults, linked, mounted, using
from shared.copying import HOLDS
from shared.database import reading
from shared.disks import beside, removal, setaside
from shared.hypervisor import undo as hypervisor
from shared.hypervisor.connection import connect
from shared.hypervisor.errors import HypervisorError, LibvirtBusy, LibvirtUnavailable
from shared.manifest import TPM
from shared.operations import journal
from shared.operations.journal import action
from shared.settings import settings
from shared.vault import PARTIAL, Vault

log = structlog.get_logger()


@action
def remove_copy(folder: str) -> None:
    """A snapshot's, image's or farm's folder in the vault, whole or half-made. On a vault that has
    become read-only it is left, for the doctor to find: the server need not wait for the disk."""
    mounted.ensure()  # else it would be taken for gone
    vault = Vault(settings().vault)
    path = vault.here(folder)
    for each in (path.with_name(path.name + PARTIAL), path):
        try:
            vault.remove(each)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            log.warning("copy.left", folder=str(each), reason=str(error))


@action
def remove_file(path: str) -> None:
    Path(path).unlink(missing_ok=True)


@action
def remove_base(path: str) -> None:
    """The base of linked clones, unless a domain stands on it that was defined meanwhile, or a disk
    that was left, or it cannot be told: it is left then, for the doctor to find. Domains that go
    are waited for."""
    base = Path(path)
    if not base.exists():
        return
    try:
        needing = using.users(connect(settings().libvirt_uri)).get(base.resolve(), {})
    except (LibvirtUnavailable, LibvirtBusy):
        raise
    except HypervisorError as error:
        log.warning("base.left", path=path, reason=str(error))
        return
    with reading() as session:
        going = {each["uuid"] for each in journal.left_to_do(session, "undefine_domain")}
    staying = [name for uuid, name in needing.items() if uuid not in going]
    disks = linked.left_on(base)
    if staying or disks:
        log.warning("base.left", path=path, domains=sorted(staying), disks=disks)
        return
    if needing:
        names = ", ".join(sorted(needing.values()))
        raise LibvirtBusy(f"{path} is needed by {names}, which another operation removes.")
    base.unlink(missing_ok=True)


@action
def resume_domain(uuid: str) -> None:
    hypervisor.resume_domain(settings().libvirt_uri, uuid)


@action
def release_memory(uuid: str, folder: str | None = None) -> None:
    """Of a guest whose memory is saved in the folder, which entries of an earlier version do not
    name."""
    uri = settings().libvirt_uri
    hypervisor.release_memory(uri, uuid, settings().vault / HOLDS)
    _go_on(uuid, folder)


@action
def thaw_domain(uuid: str) -> None:
    hypervisor.thaw_domain(settings().libvirt_uri, uuid)


@action
def abort_backup(uuid: str, folder: str | None = None, ran: bool = False) -> None:
    """The job that copies into the folder. Entries of an earlier version name none, nor whether
    the guest `ran`."""
    hypervisor.abort_backup(settings().libvirt_uri, uuid, folder)
    if ran:
        _go_on(uuid, folder)


def _go_on(uuid: str, folder: str | None) -> None:
    """Of a guest that ran: it may be the half-made copy that there was no room beside."""
    hypervisor.go_on(
        settings().libvirt_uri, uuid, lambda: shutil.rmtree(folder or "", ignore_errors=True)
    )


@action
def define_domain(xml: str) -> None:
    hypervisor.define_domain(settings().libvirt_uri, xml)


@action
def undefine_domain(uuid: str, keep_nvram: bool = False, keep_tpm: bool = False) -> None:
    uri = settings().libvirt_uri
    hypervisor.undefine_domain(uri, uuid, keep_nvram=keep_nvram, keep_tpm=keep_tpm)


@action
def start_domain(uuid: str, paused: bool = False) -> None:
    hypervisor.start_domain(settings().libvirt_uri, uuid, paused=paused)


@action
def stop_domain(uuid: str, resumed: bool = False, boot: int | None = None) -> None:
    """Entries of an earlier version do not tell whether it was `resumed` from its memory, nor in
    which boot it was before."""
    hypervisor.stop_domain(settings().libvirt_uri, uuid, resumed=resumed, boot=boot)


@action
def swap_back(
    live: dict[str, str],
    operation_id: str,
    uuid: str | None = None,
    missing: Collection[str] = (),
) -> None:
    """The files that a revert or restore replaced become live again; of the `missing` there were
    none. Entries of an earlier version name no domain.

    One that somebody started on what the operation had brought is started anew.
    """
    files = _paths(live)
    had_none = {
        target: files[target]
        for target in missing
        if setaside.is_brought(files[target], operation_id)
    }
    brought = {**setaside.swapped(files, operation_id), **had_none}
    with _without(uuid, files, brought.values(), operation_id):
        setaside.swap_back(files, operation_id)
        setaside.take_away(had_none, operation_id)
        # With an empty directory it would start without certificates; one that its owner has
        # started is at making its own.
        if TPM in missing and not (uuid and hypervisor.is_on(settings().libvirt_uri, uuid)):
            setaside.discard({TPM: files[TPM]}, operation_id)
            beside.remove_state_folder(files[TPM].parent)


@action
def swap_again(
    live: dict[str, str],
    operation_id: str,
    uuid: str | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """The files that a revert or restore brought become live again.

    Only those that an undo had moved aside: the others, perhaps all, are live still. Its owner had
    disks `elsewhere` before, which the undo may have started the server on.
    """
    files = _paths(live)
    moved = {
        target: path
        for target, path in files.items()
        if setaside.new_path(path, operation_id).exists()
    }
    going = [*moved.values(), *(map(Path, elsewhere) if moved else ())]
    with _without(uuid, files, going, operation_id):
        setaside.swap(moved, operation_id)


@action
def discard_set_aside(live: dict[str, str], operation_id: str) -> None:
    setaside.discard(_paths(live), operation_id)


@action
def remove_state_folder(folder: str) -> None:
    """The directory that a TPM's state was to be in, unless one is; of an earlier version."""
    beside.remove_state_folder(Path(folder))


@action
def give_back(files: list[str], operation_id: str) -> None:
    """The files that were to be removed are in their places again."""
    removal.give_back(map(Path, files), operation_id)


@action
def discard_removed(files: list[str], operation_id: str, kept: list[str]) -> None:
    """The files that were set aside to be removed are gone, with what reverts kept of them."""
    removal.discard(map(Path, files), operation_id, map(Path, kept))


@contextmanager
def _without(
    uuid: str | None, files: Mapping[str, Path], going: Iterable[Path], operation_id: str
) -> Iterator[None]:
    """No domain runs on those of the files that are `going`, nor wakes on what comes instead: one
    that somebody started is off meanwhile, and started anew, by whoever comes to that."""
    if uuid is None:
        yield
        return
    uri = settings().libvirt_uri
    needed = {target: path for target, path in files.items() if target != TPM}  # libvirt makes it
    note = setaside.note_of(needed, operation_id)
    if present := [path for path in going if path.exists()]:
        if (state := hypervisor.state_on(uri, uuid, present)) != "stopped":
            log.warning("server.started_anew", domain=uuid, files=[*map(str, present)])
            setaside.write_note(note, state)
            hypervisor.stop_domain(uri, uuid)
            faults.point("without:off")
        hypervisor.drop_saved_state(uri, uuid)
    yield
    if note.exists():
        if all(path.exists() for path in needed.values()):  # else it cannot be started
            hypervisor.start_domain(uri, uuid, paused=note.read_text() == "paused")
        note.unlink()


def _paths(live: dict[str, str]) -> dict[str, Path]:
    return {target: Path(path) for target, path in live.items()}
