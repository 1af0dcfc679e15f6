"""What must hold before the disks of a server are replaced by a copy's, and what is refused.

Owns: the refusals of a revert, a restore and their undo, each made before anything is changed.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from shared import errors, using
from shared.disks import setaside
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import DiskInUse, DiskLost, MemoryNotUsable
from shared.manifest import TPM, Manifest
from shared.models import Server


class SavedStatePresent(errors.Conflict):
    """The server's memory is saved to disk"""

    code = "managed_save_present"


class ServerTransient(errors.Conflict):
    """The server is gone once it is stopped"""

    code = "server_transient"


class MediumMissing(errors.Conflict):
    """A file that the guest has in a drive is gone"""

    code = "medium_missing"


class DiskFolderMissing(errors.Conflict):
    """The directory of the server's disks is gone"""

    code = "disk_folder_missing"


class TpmFolderMissing(errors.Conflict):
    """The copy's TPM has nowhere to go"""

    code = "tpm_folder_missing"


def refuse_unsafe(domain: Domain, started_by: str, replaced: Collection[str]) -> None:
    """Raise where stopping the domain, or new disks under it, would lose something. It is
    `started_by` that definition again, or, where that fails, by its own."""
    if not domain.is_persistent:
        raise ServerTransient(
            f"{domain.name} is transient: libvirt would forget it once it is stopped. Nothing was "
            f"changed. Define it (`virsh dumpxml {domain.name} > it.xml; virsh define it.xml`) "
            "and ask again."
        )
    if domain.has_managed_save:
        raise SavedStatePresent(
            f"{domain.name} has a saved state (`virsh managedsave`) that belongs to the disks it "
            "has now; waking it on other disks would damage them. Nothing was changed. Start the "
            "server, or drop the state with `virsh managedsave-remove`, and ask again."
        )
    if domain.wanted_state != "stopped":
        disks = DomainDefinition.parse(domain.live_definition()).disks
        files = (Path(each.path) for each in disks if each.target in replaced and each.path)
        if lost := domain.lost_disks(files):
            raise DiskLost(
                f"{domain.name} runs on {', '.join(lost)}, and no file of that name is there any "
                "more, or another one: what the guest has on it since the copy is in the file that "
                "QEMU holds open alone, and gone once it is stopped. Nothing was changed. Save "
                "from inside the "
                "guest what you need (or as root from /proc/PID/fd of its QEMU), shut the server "
                "down, and ask again."
            )
        for target, path in domain.lost_files((started_by, domain.definition()), replaced).items():
            raise MediumMissing(
                f"{domain.name} is to have {path} in {target}, and that file is gone: the guest "
                "runs, but once stopped it would not start again. Nothing was changed. Put the "
                "file back, or take it out of the domain's definition (`virsh change-media "
                f"{domain.name} {target} --eject --config`, and `--live` where the guest still has "
                "it), and ask again. Where it is in the copy's definition alone: revert without "
                "its memory, or shut the server down first, then it is restored without a start."
            )


def refuse_taken(
    connection: Any, server: Server, previous: str | None, live: dict[str, Path]
) -> None:
    """Raise DiskInUse where another domain stands on a file of the server's, or was given one that
    was the server's once, and is no more; it need not run."""
    own = {path.resolve() for path in _files(previous)} if previous else set()
    uses = using.uses(connection)
    for path in (path for target, path in live.items() if target != TPM):
        others = (uses.standing if path in own else uses.needing).get(path, {})
        names = sorted(name for uuid, name in others.items() if uuid != server.domain_uuid)
        if names:
            raise DiskInUse(
                f"{path} is needed by domain {', '.join(names)} now, so it was not replaced and "
                "every disk is as it was. Clone the copy instead, or take the file from that "
                "domain, and ask again."
            )


def refuse_devices(definition: str, manifest: Manifest) -> None:
    """Raise DiskError for a disk that is to be a device, also one that is not there: a file in its
    place would lie in the host's memory."""
    for disk in DomainDefinition.parse(definition).disks:
        path = Path(disk.path or "")
        if disk.target in targets_of(manifest) and (
            disk.kind != "file" or path.parts[1:2] == ("dev",)
        ):
            raise setaside.no_plain_file(disk.target, path)


def refuse_other_disks(wanted: str, stored: str, manifest: Manifest) -> None:
    """Raise MemoryNotUsable where the memory would find its disks in another format, or another
    place for the UEFI variables."""
    now_, then = formats_of(wanted), formats_of(stored)
    changed = [target for target in targets_of(manifest) if now_.get(target) != then.get(target)]
    nvram = [DomainDefinition.parse(each).nvram_path for each in (wanted, stored)]
    if changed or nvram[0] != nvram[1]:
        raise MemoryNotUsable(
            f"Since the snapshot {', '.join(changed) or 'the UEFI variables'} of the server were "
            "defined anew, in another format or place, which its memory knows nothing of. Nothing "
            "was changed; revert without the memory."
        )


def refuse_lost_folders(live: dict[str, Path]) -> None:
    """Raise DiskFolderMissing: none is made, since what was mounted there may be missing."""
    for target, path in live.items():
        if target != TPM and not path.parent.is_dir():
            raise DiskFolderMissing(
                f"{target} of the copy belongs in {path.parent}, which is no directory of this "
                "host. Nothing was changed; make it, or mount what belongs there, and ask again."
            )


def targets_of(manifest: Manifest) -> list[str]:
    return [disk.target for disk in manifest.disks]


def formats_of(definition: str) -> dict[str, str]:
    """The format that each disk is defined with, whatever it was stored in."""
    return {disk.target: disk.format for disk in DomainDefinition.parse(definition).disks}


def paths_of(definition: str) -> dict[str, str | None]:
    return {disk.target: disk.path for disk in DomainDefinition.parse(definition).disks}


def _files(definition: str) -> list[Path]:
    """The disks' files, and that of the UEFI variables."""
    domain = DomainDefinition.parse(definition)
    return [Path(path) for path in (*paths_of(definition).values(), domain.nvram_path) if path]
