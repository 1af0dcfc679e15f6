"""`triptych-admin doctor`: what differs between the database, libvirt and the disks of this host.

Workers, beat and the bystander put right what they know of. This finds what none of them looks
for: what was moved, removed or restored by hand, and what waits because a service is down. To
examine changes nothing. To repair removes no copy, no disk and nothing that can still be
undone, and leaves alone what an operation is at; the repairs are those of the services.

    copies     rows, folders, manifests, file modes       guests   domains of libvirt
    leftovers  half-made and half-removed folders         clones   those that are gone or left
    work       operations whose worker is dead            kept     what reverts set aside
    bases      what linked clones stand on
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from shared import mounted, recovery  # noqa: F401  registers the journal's actions
from shared.database import reading
from shared.doctor import bases, clones, copies, guests, kept, leftovers, work
from shared.doctor.findings import Finding
from shared.doctor.site import Site
from shared.errors import TriptychError, VaultNotMounted
from shared.hypervisor import inventory
from shared.hypervisor.connection import connect
from shared.hypervisor.errors import LibvirtUnavailable
from shared.models import Host
from shared.operations import presence
from shared.operations.patience import DATABASE_AWAY
from shared.settings import settings
from shared.vault import Vault

Check = Callable[[Site], Iterable[Finding]]

# Guests first: they cannot wait. Then operations, whose clearing up settles much of the rest.
_OF_LIBVIRT: tuple[Check, ...] = (guests.differences, clones.differences)
_OF_THE_REST: tuple[Check, ...] = (
    work.differences,
    copies.differences,
    leftovers.differences,
    kept.differences,
    bases.differences,
)


def examine() -> list[Finding]:
    """All differences, in the order in which they are to be repaired. Changes nothing.

    What is away is a finding of its own: without libvirt the rest is still looked at, without
    the database or the vault there is nothing to compare.
    """
    url = make_url(settings().database_url.get_secret_value())
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return [_database_away(url, "there is no such file")]  # to connect would make one
    try:
        return list(_examined())
    except (*DATABASE_AWAY, DatabaseError) as error:
        return [_database_away(url, _one_line(error))]


def repair(findings: Iterable[Finding]) -> None:
    """Put right what can be, and note in each finding whether that was done."""
    for each in findings:
        if each.repair is None:
            continue
        try:
            each.fixed = each.repair()
            reason = "somebody is at work on it; it was left alone, run this again"
        except (TriptychError, OSError, SQLAlchemyError) as error:
            reason = f"tried, and it failed: {_one_line(error)}"
        if not each.fixed:
            each.remedy += f" ({reason})"


def _examined() -> Iterator[Finding]:
    site = Site(settings().host, settings().libvirt_uri, Vault(settings().vault), None)
    if problem := _not_the_workers_vault(site):
        yield problem
        return
    try:
        site = replace(site, domains=inventory.scan(connect(site.uri)))
        for check in _OF_LIBVIRT:
            yield from _looked(check, site)
    except LibvirtUnavailable as error:
        remedy = "see to libvirtd and run this again: guests and clones were not looked at"
        yield Finding("libvirt", site.uri, _one_line(error), remedy)
    for check in _OF_THE_REST:
        yield from _looked(check, site)


def _looked(check: Check, site: Site) -> Iterator[Finding]:
    """One check; what stops it does not stop the others. Raises LibvirtUnavailable."""
    try:
        yield from check(site)
    except LibvirtUnavailable:
        raise
    except (TriptychError, OSError) as error:  # a domain that has just gone, a right that we lack
        name = check.__module__.rpartition(".")[2]
        remedy = "run this again, with the rights that the workers have: its rest was not looked at"
        yield Finding(name, site.host, f"it stopped: {_one_line(error)}", remedy)


def _not_the_workers_vault(site: Site) -> Finding | None:
    """In another directory than theirs, or with the file system not mounted, every worker of the
    host would look dead and every copy gone."""
    detail, root = "", site.vault.root
    with reading() as session:
        host = session.get(Host, site.host)
    theirs = host.facts.get("vault") if host else None
    if not root.is_dir():
        detail = "it is no directory"
    elif theirs and Path(theirs) != root:  # the journal has paths as the workers name them
        detail = f"the workers of host {site.host} have their vault at {theirs}"
    elif found := _not_the_hosts():
        detail = f"it is not the vault of host {site.host}: {found}"
    elif any(each.owner for each in site.running()) and not presence.folder().is_dir():
        detail = "an operation is running, and its worker's lock is not here"
    if not detail:
        return None
    remedy = (
        "give TRIPTYCH_VAULT and TRIPTYCH_HOST as the workers have them, mount it (or say that it "
        "was replaced, with `vault adopt`), run again: nothing was looked at"
    )
    return Finding("vault", str(root), detail, remedy)


def _not_the_hosts() -> str | None:
    """What there is instead of the host's vault."""
    try:
        mounted.look()
    except VaultNotMounted as error:
        return str(error.extra["found"])
    return None


def _database_away(url: URL, reason: str) -> Finding:
    remedy = "see to it, or to TRIPTYCH_DATABASE_URL, and run this again: nothing was compared"
    return Finding("database", str(url), f"it cannot be used: {reason}", remedy)


def _one_line(error: Exception) -> str:
    """The first line of an error, without the statement and the end of the sentence."""
    told = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return told.splitlines()[0].rstrip(". ")
