"""Which files domains have for disks, and what those depend on: what a deletion must leave."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.disks import images
from shared.disks.errors import CopyFailed
from shared.hypervisor import inventory
from shared.hypervisor.domains import Domain
from shared.hypervisor.errors import DomainMissing

Users = dict[Path, dict[str, str]]
"""A file, links resolved, to the domains that need it: name by UUID."""


@dataclass
class Uses:
    """`standing` are the domains that a file is below their own disks of, without being one."""

    needing: Users = field(default_factory=dict)
    standing: Users = field(default_factory=dict)


def users(connection: Any) -> Users:
    """The files that any domain of the host needs. Raises what `uses` does."""
    return uses(connection).needing


def uses(connection: Any) -> Uses:
    """The files that any domain of the host needs, and for what. Raises what libvirt raises: where
    one cannot be asked, it is not known what it needs."""
    found = Uses()
    for domain in inventory.all_domains(connection):
        try:
            files = inventory.files_of(domain)
        except DomainMissing:  # undefined a moment ago
            continue
        own = _resolved(map(Path, files))
        for path in needed(files):
            found.needing.setdefault(path, {})[domain.uuid] = domain.name
            if path not in own:
                found.standing.setdefault(path, {})[domain.uuid] = domain.name
    return found


def needed(files: Mapping[str, str]) -> set[Path]:
    """The files, by path with their formats, and what they depend on; links resolved."""
    found = _resolved(map(Path, files))
    for path, image_format in files.items():
        found |= _resolved(_chain(Path(path), image_format))
    return found


def strangers(domain: Domain, made: Iterable[Path]) -> dict[str, str]:
    """The files that a domain has and that are none of those made for it, with their formats."""
    own = _resolved(made)
    files = inventory.files_of(domain)
    return {path: kind for path, kind in files.items() if Path(path).resolve() not in own}


def _chain(path: Path, image_format: str) -> list[Path]:
    try:
        if image_format == "raw" or not path.is_file():
            return []
        return images.chain(path, image_format)
    except (CopyFailed, OSError):  # what cannot be read now starts no domain either
        return []


def _resolved(paths: Iterable[Path]) -> set[Path]:
    return {each.resolve() for each in paths}
