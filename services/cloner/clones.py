"""The story of a clone: one source, copied once; each clone made from it on its own terms.

Several are made side by side. One that fails takes nothing else with it (C4): its own steps are
undone and the others are made. A farm that is cancelled, or in which no clone could be made,
leaves nothing.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from sqlalchemy import select
from sqlmodel import Session

from services.cloner import addresses, bases, identity, memory
from shared import errors, events, faults, lookups
from shared.commands import CreateClones
from shared.copying import copy_server, ensure_room_for, vault, write_out
from shared.database import reading
from shared.hypervisor import domains
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition, LeftOut, log_files, parse_domain
from shared.hypervisor.domains import Domain
from shared.hypervisor.duplicate import CloneDefinition, clone_definition, refuse_uncloneable
from shared.hypervisor.errors import DomainMissing
from shared.hypervisor.waking import Card
from shared.manifest import NVRAM, Manifest
from shared.models import Clone, Server
from shared.operations.admission import refuse_unusable
from shared.operations.context import Context, Outcome
from shared.operations.journal import Step
from shared.operations.runner import describe, handles
from shared.settings import settings
from shared.turns import MOST_CALLS, Turns

log = structlog.get_logger()

UNDER_WAY = 16
"""Clones of a farm at once, those included that do nothing but wait for their guests."""


@dataclass(frozen=True)
class Template:
    """What all clones of an operation are made of: a stored copy, how they get an identity of
    their own, and the base if they are linked to one."""

    folder: Path
    manifest: Manifest
    original: DomainDefinition
    choice: identity.Choice
    base: bases.Base | None = None

    @property
    def folders(self) -> dict[str, Path]:
        """Where clones' files go, by target: beside the source's own, or in `clone_dir`."""
        beside = {disk.target: disk.path for disk in self.original.disks}
        targets = [disk.target for disk in self.manifest.disks]
        if self.manifest.nvram:
            beside[NVRAM] = self.original.nvram_path
            targets.append(NVRAM)
        chosen = settings().clone_dir
        return {each: chosen or Path(beside[each] or "").resolve().parent for each in targets}


@handles(CreateClones)
def create(context: Context, command: CreateClones) -> Outcome:
    """Make `count` clones of a server, its snapshot or an image (C1 to C4)."""
    with reading() as session:
        source = _source_folder(session, command)
        server = lookups.server(session, context.operation.server_id, forgotten=True)
        planned = list(session.scalars(_planned(context.id)))
    if not planned:
        raise errors.NothingToRetry(
            "The clones that were to be made again have been deleted since. Nothing was made."
        )
    if command.with_memory:
        memory.refuse(command, server, source)
    choice = identity.choose(command, server, source)
    temporary, pause_ms, taken_at = source is None, None, None
    if source is None:
        domain = domains.find(connect(settings().libvirt_uri), server.domain_uuid)
        _refuse_on_devices(DomainDefinition.parse(domain.live_definition()))
        refuse_uncloneable(parse_domain(domain.definition()))
        copied = copy_server(
            context,
            server,
            "farm",
            context.id,
            quiesce=command.quiesce,
            memory=command.with_memory,
        )
        pause_ms, taken_at = copied.manifest.pause_ms, copied.taken_at.isoformat()
        source = vault().folder("farm", server.id, context.id)
    template = _template(context, command, source, choice, temporary)
    if template.base is None:  # all of them, or none: not as many as there happens to be room for
        ensure_room_for(len(planned), source, template.manifest, template.folders)
    definitions = [template.original.xml]
    if command.with_memory:
        definitions.append(memory.definition_in(template.folder))
    with addresses.reserved(context, planned, *definitions) as macs:
        made = _make_all(context, command, template, planned, server.host, macs)

    def apply(session: Session) -> list[Step]:
        for row in (*made, *planned):
            session.merge(row)
        for clone in planned:
            fact = "clone.created" if clone.state == "ready" else "clone.failed"
            events.emit(session, fact, server.id, clone=clone.id, name=clone.name)
        return [("remove_copy", {"folder": str(source)})] if temporary else []

    result: dict[str, Any] = {
        "farm": planned[0].farm_id if planned else None,
        "clones": [_outcome(clone) for clone in planned],
        "pause_ms": pause_ms,
        "taken_at": taken_at,
        "consistency": template.manifest.consistency,
        "consistency_reason": template.manifest.consistency_reason,
    }
    if command.linked and template.base is None:
        result["not_linked"] = bases.UNNEEDED
    return Outcome(result, apply)


def _template(
    context: Context,
    command: CreateClones,
    source: Path,
    choice: identity.Choice,
    temporary: bool,
) -> Template:
    manifest = vault().manifest(source)
    original = DomainDefinition.parse((source / manifest.definition).read_text())
    _refuse_on_devices(original)
    refuse_uncloneable(parse_domain(original.xml))
    found = Template(source, manifest, original, choice)
    for folder in sorted(set(found.folders.values())):
        if not folder.is_dir():
            raise errors.Unsupported(
                f"{folder}, where the clones' files would go, is no directory of this host. No "
                "clone was made; make it, or set TRIPTYCH_CLONE_DIR to another for the host's "
                "workers."
            )
    if not command.linked:
        return found
    base = bases.make(context, source, manifest, found.folders, temporary=temporary)
    return replace(found, base=base)


def _refuse_on_devices(original: DomainDefinition) -> None:
    """Raise Unsupported where there is no directory for clones' disks: beside a block device is
    /dev, which is in the host's memory."""
    on_devices = [
        f"{disk.target} ({disk.path})"
        for disk in original.disks
        if disk.kind == "block" and not disk.left_out_because
    ]
    if on_devices and not settings().clone_dir:
        raise errors.Unsupported(
            f"{original.name} has disks on block devices: {', '.join(on_devices)}. Its clones' "
            "disks are files, and nothing says where they are to go. No clone was made; set "
            "TRIPTYCH_CLONE_DIR for the host's workers."
        )


def _make_all(
    context: Context,
    command: CreateClones,
    template: Template,
    planned: list[Clone],
    host: str,
    macs: Mapping[str, Mapping[str, str]],
) -> list[Server]:
    """The servers of the clones that could be made; raises what the last one failed with where
    none could."""
    making = Turns(min(settings().concurrency, MOST_CALLS))
    numbers = itertools.count(1)

    def work(clone: Clone) -> Server:
        with making.one(context.check):
            context.phase(f"clone {next(numbers)} of {len(planned)}: {clone.name}")
            new = _make(context, command, template, clone, macs[clone.id])
        # Who waits for a guest waits beside the others, not in their way.
        clone.identity = _own_identity(context, command, new)
        server = Server(name=clone.name, host=host, domain_uuid=new.definition.uuid)
        clone.server_id, clone.state = server.id, "ready"
        clone.linked_to = template.base.paths if template.base else []
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
        refuse_unusable(image)
        return vault().folder("image", image.server_id, image.id)
    server = lookups.server(session, command.source.id)
    if command.source.kind == "snapshot":
        snapshot = lookups.snapshot(session, server, command.source.snapshot)
        return vault().folder("snapshot", server.id, snapshot.id)
    return None


def _planned(operation_id: str) -> Any:
    """But for those that were deleted while the operation was queued."""
    row: Any = Clone
    query = select(Clone).where(row.operation_id == operation_id, row.state != "deleted")
    return query.order_by(row.name)


def _outcome(clone: Clone) -> dict[str, Any]:
    return {
        "id": clone.id,
        "name": clone.name,
        "server": clone.server_id,
        "state": clone.state,
        "way": clone.way,
        "linked_to": clone.linked_to,
        "identity": identity.public(clone.identity),
        "error": clone.error,
    }


@dataclass(frozen=True)
class _Made:
    """A clone that is there, and runs if it is to; `cards` are those that its guest is to lose."""

    domain: Domain
    definition: CloneDefinition
    has_nvram: bool
    way: identity.Way
    cards: list[Card]


def _make(
    context: Context,
    command: CreateClones,
    template: Template,
    clone: Clone,
    macs: Mapping[str, str],
) -> _Made:
    """Define the clone early, so that a bad definition costs no bytes; then its disks, and start
    it."""
    connection = connect(settings().libvirt_uri)
    _refuse_taken_name(connection, clone.name)
    manifest, original, base = template.manifest, template.original, template.base
    formats = {disk.target: "qcow2" if base else disk.format for disk in manifest.disks}
    suffixes = {**formats, NVRAM: "fd", memory.MEMORY: "save"}
    folders = template.folders
    if command.with_memory:
        folders = {**folders, memory.MEMORY: folders[manifest.disks[0].target]}
    files = _destinations(folders, suffixes, clone.name)
    definition = clone_definition(
        original.xml,
        name=clone.name,
        uuid=str(uuid4()),
        disk_paths={disk.target: str(files[disk.target]) for disk in manifest.disks},
        disk_formats=formats,
        vcpus=command.vcpus,
        memory_bytes=command.memory_mib * 2**20 if command.memory_mib else None,
        nvram_path=str(files[NVRAM]) if NVRAM in files else None,
        mac_prefix=settings().mac_prefix,
        macs=macs,
    )
    named = {each.target for each in definition.left_out}
    lost = (
        LeftOut(each.target, each.reason) for each in manifest.left_out if each.target not in named
    )
    definition = replace(definition, left_out=(*definition.left_out, *lost))
    beside = next(iter(files.values())).parent
    way = template.choice.begin(clone.name, beside, context.check)
    prepared = way.prepare(definition)
    if not command.with_memory:  # such a clone wakes without links anyway
        definition = prepared
    paths = (*map(str, (*files.values(), *way.files)), *_new_logs(definition.xml))
    removals: list[Step] = [("remove_file", {"path": path}) for path in paths]
    context.undo_all(*removals, ("undefine_domain", {"uuid": definition.uuid}))
    domain = domains.define(connection, definition.xml)
    faults.point("clone:defined")
    if base:
        base.link(files)
        manifest = manifest.model_copy(update={"disks": []})  # the rest is copied as ever
    copied = write_out(context, template.folder, manifest, files)
    clone.way = bases.WAY if base else copied
    cards: list[Card] = []
    way.before_start(domain)
    if command.with_memory:
        saved = files[memory.MEMORY]
        cards = memory.wake(context, domain, template.folder, definition, macs, saved)
    elif command.start:
        domain.start()
    if command.start:
        faults.point("clone:started")
    nvram = DomainDefinition.parse(domain.definition()).nvram_path  # libvirt's own, if not ours
    kept = {*paths, *([nvram] if nvram else ())} - {str(files.get(memory.MEMORY))}
    clone.files = sorted(kept)
    return _Made(domain, definition, NVRAM in files, way, cards)


def _own_identity(context: Context, command: CreateClones, new: _Made) -> dict[str, Any]:
    """Have the clone's guest renew what is its source's; what came of it."""
    network = memory.Network()
    if command.with_memory:  # its links are down, and are its source's
        new.way.renew(new.domain)
        # Until here nobody on the network has seen whose double it was (C5).
        renewal = new.way.renewal
        own = command.identity == "keep" or not renewal.kept
        if not own:
            renewal.kept.append(("links", "down, since it is its source's double in the guest"))
        linked = own and not renewal.addresses
        network = memory.connect_to_network(context, new.domain, new.cards, linked=linked)
        if linked:
            new.way.connected(new.domain, network.cards)
    elif command.start:
        new.way.after_start(new.domain)
    return network.tell(identity.report(new.definition, new.has_nvram, new.way.renewal))


def _new_logs(definition: str) -> list[str]:
    """Files that the clone's serial lines will make, where they are not there yet."""
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
    folders: Mapping[str, Path], suffixes: Mapping[str, str], name: str
) -> dict[str, Path]:
    """The clone's files by target, none of which is there yet."""
    files: dict[str, Path] = {}
    for target, folder in folders.items():
        path = folder / f"{name}-{target}.{suffixes[target]}"
        identity.refuse_taken(path)
        files[target] = path
    return files
