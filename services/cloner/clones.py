"""The story of a clone: one source, copied once; each clone made from it on its own terms.

Several are made side by side. One that fails takes nothing else with it (C4): its own steps are
undone and the others are made. A farm that is cancelled, or in which no clone could be made,
leaves nothing.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from sqlalchemy import select
from sqlmodel import Session

from services.cloner import identity, memory
from shared import errors, events, faults, lookups
from shared.commands import CreateClones
from shared.copying import NVRAM, copy_server, vault, write_out
from shared.database import reading
from shared.hypervisor import domains
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition, log_files
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition, clone_definition
from shared.hypervisor.errors import DomainMissing
from shared.hypervisor.waking import Card
from shared.manifest import Manifest, read_manifest
from shared.models import Clone, Server
from shared.operations.context import Context, Outcome
from shared.operations.journal import Step
from shared.operations.runner import describe, handles
from shared.settings import settings
from shared.turns import MOST_CALLS, Turns

log = structlog.get_logger()

UNDER_WAY = 16
"""Clones of a farm at once, those included that do nothing but wait for their guests."""


@handles(CreateClones)
def create(context: Context, command: CreateClones) -> Outcome:
    """Make `count` clones of a server, its snapshot or an image (C1 to C4)."""
    with reading() as session:
        source = _source_folder(session, command)
        server = lookups.server(session, context.operation.server_id, forgotten=True)
        planned = list(session.scalars(_planned(context.id)))
    if command.with_memory:
        memory.refuse(command, server, source)
    temporary, pause_ms = source is None, None
    if source is None:
        copied = copy_server(
            context,
            server,
            "farm",
            context.id,
            quiesce=command.quiesce,
            memory=command.with_memory,
        )
        pause_ms = copied.manifest.pause_ms
        source = vault().folder("farm", server.id, context.id)
    made = _make_all(context, command, source, planned, server.host)

    def apply(session: Session) -> list[Step]:
        for row in (*made, *planned):
            session.merge(row)
        for clone in planned:
            fact = "clone.created" if clone.state == "ready" else "clone.failed"
            events.emit(session, fact, server.id, clone=clone.id, name=clone.name)
        return [("remove_copy", {"folder": str(source)})] if temporary else []

    clones = [_outcome(clone) for clone in planned]
    return Outcome({"clones": clones, "pause_ms": pause_ms}, apply)


def _make_all(
    context: Context, command: CreateClones, source: Path, planned: list[Clone], host: str
) -> list[Server]:
    """The servers of the clones that could be made; raises what the last one failed with where
    none could."""
    making = Turns(min(settings().concurrency, MOST_CALLS))
    numbers = itertools.count(1)

    def work(clone: Clone) -> Server:
        with making.one(context.check):
            context.phase(f"clone {next(numbers)} of {len(planned)}: {clone.name}")
            new = _make(context, command, source, clone)
        # Who waits for a guest waits beside the others, not in their way.
        clone.identity = identity.report(new.definition, new.has_nvram)
        if command.with_memory:
            clone.identity = memory.connect_to_network(
                context, new.domain, new.cards, clone.identity
            )
        server = Server(name=clone.name, host=host, domain_uuid=new.definition.uuid)
        clone.server_id, clone.state = server.id, "ready"
        return server

    units = {clone.id: partial(work, clone) for clone in planned}
    outcomes = context.side_by_side(units, UNDER_WAY)
    made: list[Server] = []
    for clone, outcome in zip(planned, outcomes.values(), strict=True):
        if isinstance(outcome, Exception):
            clone.state, clone.error = "failed", describe(outcome)
            log.warning("clone.failed", clone=clone.name, **clone.error)
            failure = outcome
        else:
            made.append(outcome)
    if not made:
        raise failure
    return made


def _source_folder(session: Session, command: CreateClones) -> Path | None:
    """The folder of the snapshot or image; None for a server, which is copied first."""
    if command.source.kind == "image":
        image = lookups.image(session, command.source.id)
        return vault().folder("image", image.server_id, image.id)
    server = lookups.server(session, command.source.id)
    if command.source.kind == "snapshot":
        return vault().folder("snapshot", server.id, lookups.snapshot(session, server).id)
    return None


def _planned(operation_id: str) -> Any:
    row: Any = Clone
    return select(Clone).where(row.operation_id == operation_id).order_by(row.name)


def _outcome(clone: Clone) -> dict[str, Any]:
    return {
        "id": clone.id,
        "name": clone.name,
        "server": clone.server_id,
        "state": clone.state,
        "way": clone.way,
        "identity": clone.identity,
        "error": clone.error,
    }


@dataclass(frozen=True)
class _Made:
    """A clone that is there, and runs if it is to; `cards` are those that its guest is to lose."""

    domain: Domain
    definition: CloneDefinition
    has_nvram: bool
    cards: list[Card]


def _make(context: Context, command: CreateClones, source: Path, clone: Clone) -> _Made:
    """Define the clone early, so that a bad definition costs no bytes; then its disks, and start
    it."""
    connection = connect(settings().libvirt_uri)
    _refuse_taken_name(connection, clone.name)
    manifest = read_manifest(source)
    original = DomainDefinition.parse((source / manifest.definition).read_text())
    files = _destinations(manifest, original, clone.name, command.with_memory)
    definition = clone_definition(
        original.xml,
        name=clone.name,
        uuid=str(uuid4()),
        disk_paths={disk.target: str(files[disk.target]) for disk in manifest.disks},
        disk_formats={disk.target: disk.format for disk in manifest.disks},
        vcpus=command.vcpus,
        memory_bytes=command.memory_mib * 2**20 if command.memory_mib else None,
        nvram_path=str(files[NVRAM]) if NVRAM in files else None,
        mac_prefix=settings().mac_prefix,
    )
    paths = (*map(str, files.values()), *_new_logs(definition.xml))
    removals: list[Step] = [("remove_file", {"path": path}) for path in paths]
    context.undo_all(*removals, ("undefine_domain", {"uuid": definition.uuid}))
    domain = domains.define(connection, definition.xml)
    faults.point("clone:defined")
    clone.way = write_out(context, source, manifest, files)
    cards: list[Card] = []
    if command.with_memory:
        cards = memory.wake(context, domain, source, definition, files[memory.MEMORY])
    elif command.start:
        domain.start()
    if command.start:
        faults.point("clone:started")
    return _Made(domain, definition, NVRAM in files, cards)


def _new_logs(definition: str) -> list[str]:
    """Log files that the clone's serial console will make, where they are not there yet."""
    return [path for path in log_files(definition) if not Path(path).exists()]


def _refuse_taken_name(connection: Any, name: str) -> None:
    try:
        domains.find_by_name(connection, name)
    except DomainMissing:
        return
    raise errors.CloneNameTaken(
        f"A domain named {name!r} exists in libvirt; this clone was not made. Choose another name.",
        conflict=name,
    )


def _destinations(
    manifest: Manifest, original: DomainDefinition, name: str, with_memory: bool
) -> dict[str, Path]:
    """Where the clone's files go, by target: beside the source's own, or in `clone_dir`."""
    paths = {disk.target: disk.path for disk in original.disks}
    wanted = [(disk.target, paths[disk.target], disk.format) for disk in manifest.disks]
    if manifest.nvram:
        wanted.append((NVRAM, original.nvram_path, "fd"))
    if with_memory:
        wanted.append((memory.MEMORY, paths[manifest.disks[0].target], "save"))
    files: dict[str, Path] = {}
    for target, beside, suffix in wanted:
        folder = settings().clone_dir or Path(beside or "").resolve().parent
        path = folder / f"{name}-{target}.{suffix}"
        if path.exists():
            raise errors.CloneNameTaken(
                f"{path} exists already; this clone was not made and the file is as it was. "
                "Choose another name, or remove the file if nothing uses it.",
                conflict=str(path),
            )
        files[target] = path
    return files
