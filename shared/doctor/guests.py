"""Domains of libvirt: gone, held still, copied for nobody, or on files that are not theirs."""

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select

from shared.copying import HOLDS
from shared.database import reading
from shared.disks.setaside import FOLDER
from shared.doctor.findings import Finding
from shared.doctor.site import Site, spoken_for, steps
from shared.hypervisor import backup, domains, undo
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import DomainMissing
from shared.hypervisor.inventory import DomainFacts
from shared.hypervisor.saving import is_stilled, note_of
from shared.models import Clone, JournalEntry, Operation
from shared.operations import bystander, runner

CHECK = "guest"


def differences(site: Site) -> Iterator[Finding]:
    """Raises LibvirtUnavailable."""
    yield from _gone(site)
    for operation in site.lost():
        for entry in steps(operation, "undo"):
            yield from _held(site, operation, entry)
    for domain in site.domains or []:
        if domain.state != "stopped":
            yield from _copied_for_nobody(site, domain)
        yield from _on_our_files(site, domain)


def find(site: Site, uuid: str) -> Domain | None:
    try:
        return domains.find(connect(site.uri), uuid)
    except DomainMissing:
        return None


def _gone(site: Site) -> Iterator[Finding]:
    """Registered servers that libvirt does not know, but for clones."""
    with reading() as session:
        clones = set(session.scalars(select(Clone.server_id).where(Clone.state == "ready")))  # type: ignore[call-overload]
    busy = site.busy()
    for server in site.servers():
        if server.id in clones | busy or find(site, server.domain_uuid):
            continue
        yield Finding(
            "server",
            f"{server.name} ({server.id})",
            f"libvirt has no domain {server.domain_uuid}",
            "`triptych image restore` defines it again from one of its images; if it is to be "
            f"gone, `triptych server forget {server.name}`",
        )


def _held(site: Site, operation: Operation, entry: JournalEntry) -> Iterator[Finding]:
    """A guest that a dead worker paused, or may have frozen: nobody but the journal knows that."""
    if entry.action not in bystander.AT_ONCE:
        return
    domain = find(site, entry.arguments["uuid"])
    if domain is None or not _is_held(site, domain, entry.action):
        return
    paused = entry.action != "thaw_domain"
    yield Finding(
        CHECK,
        domain.name,
        f"{'paused' if paused else 'perhaps frozen'} by operation {operation.id}, whose worker is "
        "gone",
        f"--fix {'resumes' if paused else 'thaws'} it",
        repair=lambda: _given_back(domain, operation, entry),
    )


def _is_held(site: Site, domain: Domain, action: str) -> bool:
    match action:
        case "resume_domain":
            return domain.paused_by_user
        case "release_memory":
            note = note_of(site.vault.root / HOLDS, domain.uuid)
            return domain.held_by_save or (domain.paused_by_user and is_stilled(note))
    return domain.state == "running"


def _given_back(domain: Domain, operation: Operation, entry: JournalEntry) -> bool:
    if operation.owner:
        bystander.attend(operation.owner)
    else:  # somebody tried to undo it before, and could not
        runner.clear_up(operation.id)
    return entry.seq not in {each.seq for each in steps(operation, "undo")}


def _copied_for_nobody(site: Site, facts: DomainFacts) -> Iterator[Finding]:
    """A backup job that writes into the vault and is no operation's. Others' are their own."""
    domain = find(site, facts.uuid)
    if domain is None or not _is_ours(site, domain):
        return
    yield Finding(
        CHECK,
        facts.name,
        "a backup job copies it into the vault, and no operation is at it",
        "--fix ends the job; the guest runs on",
        repair=lambda: not _is_ours(site, domain) or undo.abort_backup(site.uri, domain.uuid),
    )


def _is_ours(site: Site, domain: Domain) -> bool:
    copies = {path.parent for path in backup.job_files(domain)}
    ours = {each for each in copies if each.resolve().is_relative_to(site.vault.root.resolve())}
    with reading() as session:
        owned = spoken_for(session, "folder")
    return bool(ours) and not any(str(each.with_suffix("")) in owned for each in ours)


def _on_our_files(site: Site, domain: DomainFacts) -> Iterator[Finding]:
    """A domain that has a copy, or what a revert set aside, for a disk: both are to go one day."""
    for disk in domain.disks:
        path = Path(disk.path or "/")
        if path.resolve().is_relative_to(site.vault.root.resolve()):
            what = "a file of the vault"
        elif path.parent.name.startswith(FOLDER):
            what = "a file that a revert or restore keeps aside"
        else:
            continue
        yield Finding(
            CHECK,
            domain.name,
            f"its disk {disk.target} is {path}, {what}",
            f"shut it down, copy the file to a place of its own (`cp --reflink=auto`), and give "
            f"the domain that path (`virsh edit {domain.name}`)",
        )
