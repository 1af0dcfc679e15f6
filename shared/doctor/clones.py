"""Clones that are ready and gone, and what is left of clones that were not made.

The row of a clone that failed tells its name and no more. A domain or a file of that name may
have become somebody's own since, so that it is never removed here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select

from shared import errors
from shared.database import reading
from shared.doctor.findings import Finding
from shared.doctor.guests import find
from shared.doctor.site import Site
from shared.farms import FAILED
from shared.hypervisor.inventory import DomainFacts
from shared.models import Clone, Server
from shared.settings import settings

CHECK = "clone"


def differences(site: Site) -> Iterator[Finding]:
    """Raises LibvirtUnavailable."""
    yield from _gone(site)
    domains = {each.name: each for each in site.domains or []}
    registered = {each.domain_uuid for each in site.servers()}
    files = _files(site)
    for clone in _not_made(site):
        domain = domains.get(clone.name)
        if domain is None:
            yield from _left_files(clone, files)
        elif domain.uuid not in registered and _is_clones(domain, clone.name):
            yield _left_domain(clone, domain)


def _gone(site: Site) -> Iterator[Finding]:
    row: Any = Clone
    busy = site.busy()
    servers = {each.id: each for each in site.servers()}
    with reading() as session:
        query = select(Clone).where(row.host == site.host, row.state == "ready").order_by(row.id)
        ready = list(session.scalars(query))
    for clone in ready:
        server: Server | None = servers.get(clone.server_id or "")
        if server is None or server.id in busy or find(site, server.domain_uuid):
            continue
        yield Finding(
            CHECK,
            f"{clone.name} ({clone.id})",
            f"it is ready, and libvirt has no domain {server.domain_uuid}",
            f"if it was removed for good, `triptych server forget {server.name}`; else define it "
            "again, or restore one of its images",
        )


def _not_made(site: Site) -> list[Clone]:
    """The newest row of each name that was never made, but for names that were taken already."""
    row: Any = Clone
    with reading() as session:
        rows = list(session.scalars(select(Clone).where(row.host == site.host).order_by(row.id)))
    made = {each.name for each in rows if not _failed(each)}
    failed = {each.name: each for each in rows if each.name not in made}
    taken = errors.CloneNameTaken.code
    return [each for each in failed.values() if (each.error or {}).get("code") != taken]


def _failed(clone: Clone) -> bool:
    """Whether it was tried and never made; also of one whose farm is deleted since."""
    return clone.state in FAILED or (clone.state == "deleted" and clone.server_id is None)


def _files(site: Site) -> dict[str, Path]:
    """The files in the directories where clones' disks go, by name, but for those in use."""
    paths = [Path(disk.path) for domain in site.domains or [] for disk in domain.disks if disk.path]
    used = {path.resolve() for path in paths}
    folders = {path.parent for path in used} | {settings().clone_dir}
    there = (each for folder in folders if folder and folder.is_dir() for each in folder.iterdir())
    return {each.name: each for each in there if each not in used and each.is_file()}


def _pattern(name: str) -> re.Pattern[str]:
    """What the cloner calls the files of a clone: its name, the disk's target, the format."""
    return re.compile(re.escape(name) + r"-(nvram\.fd|[a-z]+\.[a-z0-9]+)")


def _is_clones(domain: DomainFacts, name: str) -> bool:
    pattern = _pattern(name)
    files = [Path(disk.path).name for disk in domain.disks if disk.path and disk.writable]
    return bool(files) and all(pattern.fullmatch(each) for each in files)


def _left_domain(clone: Clone, domain: DomainFacts) -> Finding:
    return Finding(
        CHECK,
        f"{clone.name} ({clone.id})",
        f"it is {clone.state}, and libvirt has a domain of that name, {domain.uuid}",
        f"if nobody uses it, `virsh undefine --nvram {clone.name}` and remove its disks; else "
        f"register it: `triptych server add {clone.name}`",
    )


def _left_files(clone: Clone, files: dict[str, Path]) -> Iterator[Finding]:
    pattern = _pattern(clone.name)
    if left := sorted(str(path) for name, path in files.items() if pattern.fullmatch(name)):
        yield Finding(
            CHECK,
            f"{clone.name} ({clone.id})",
            f"it is {clone.state}, and no domain has {', '.join(left)}",
            "remove what nobody uses",
        )
