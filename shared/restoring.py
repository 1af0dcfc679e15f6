"""Putting a stored copy back onto its server, and undoing that: revert's and restore's one story.

prepare new files ── stop ── swap names ── define ── start as it was
      the old files stay beside the live ones for as long as this can be undone (E1)
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlmodel import Session

from shared import events, faults, linked, lookups
from shared.copying import vault, write_out
from shared.database import now, reading
from shared.disks import images, setaside
from shared.disks.beside import copy_small, make_state_folder
from shared.disks.errors import ServerChanged
from shared.hypervisor import domains
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition, alone, renamed
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import DomainMissing
from shared.hypervisor.locks import refuse_if_open
from shared.hypervisor.memory import definition_in, refuse_other_name, resume_from
from shared.manifest import NVRAM, TPM, Manifest
from shared.models import Operation, Server
from shared.operations.admission import refuse_if_not_undoable
from shared.operations.context import Context, Outcome
from shared.operations.journal import Step
from shared.replaceable import (
    TpmFolderMissing,
    formats_of,
    paths_of,
    refuse_devices,
    refuse_lost_folders,
    refuse_other_disks,
    refuse_taken,
    refuse_unsafe,
    targets_of,
)
from shared.settings import settings


@dataclass
class Replaced:
    """What was put in place of what."""

    operation_id: str
    live: dict[str, str]
    """Target (or `nvram`, `tpm`) to the file's path."""
    previous: str | None
    """The definition before; None when the domain was gone."""
    set_aside: bool
    """Whether there were files to set aside, or the definition before has its disks elsewhere."""
    missing: list[str]
    """Targets that had no file, so that nothing of theirs is set aside."""
    way: str
    state: State
    links: linked.Links | None
    """Of a linked clone: what it stood on, and what it does now."""
    left_out: list[dict[str, str]]
    """What the disks before held beside the guest's data, and those now do not."""

    def outcome(self, made: dict[str, Any], apply: Callable[[Session], None]) -> Outcome:
        """Undoable (E1), unless nothing was there that could be put back."""
        result = {**made, "way": self.way, "state": self.state, "left_out": self.left_out}

        def apply_all(session: Session) -> None:
            apply(session)
            if self.links:
                self.links.write(session)

        if self.set_aside:
            record: dict[str, Any] = {
                "live": self.live,
                "previous": self.previous,
                "missing": self.missing,
            }
            if self.links:
                record[linked.STOOD_ON] = self.links.was
            return Outcome(result, apply_all, record, now() + settings().undo_retention)

        def apply_and_clear(session: Session) -> list[Step]:
            apply_all(session)
            return [("discard_set_aside", {"live": self.live, "operation_id": self.operation_id})]

        return Outcome(result, apply_and_clear)


def put_back(
    context: Context,
    server: Server,
    folder: Path,
    *,
    definition: Literal["current", "stored"],
    memory: bool = False,
) -> Replaced:
    """Replace the server's disks by those in `folder`; it is running afterwards if it was.

    With `current`, the server keeps its definition where that still has the copy's disks;
    with `stored` it gets the copy's. A domain that is gone is defined again. With `memory`,
    where the copy holds it, the guest is resumed at that instant, also if it was off. Raises
    SavedStatePresent, DiskLost, MediumMissing, DiskInUse, DiskError, DiskFolderMissing,
    TpmFolderMissing, ManifestUnreadable, InsufficientSpace, MemoryNotUsable and what libvirt
    raises.
    """
    context.phase("checking")
    manifest = vault().manifest(folder)
    connection = connect(settings().libvirt_uri)
    domain = _find(connection, server)
    previous = domain.definition() if domain else None
    clone = linked.clone_of(server.id)
    wanted = (folder / manifest.definition).read_text()
    if definition == "current" and previous and _has_the_same_disks(previous, manifest, wanted):
        wanted = previous
    wanted = alone(wanted, targets_of(manifest))
    if domain:
        wanted = renamed(wanted, domain.name)
    saved = folder / manifest.memory if memory and manifest.memory else None
    started_by = definition_in(settings().libvirt_uri, saved) if saved else wanted
    if domain:
        refuse_unsafe(domain, started_by, targets_of(manifest))
    if saved:
        refuse_other_name(started_by, domain.name if domain else server.name)
        refuse_other_disks(wanted, (folder / manifest.definition).read_text(), manifest)
    refuse_devices(wanted, manifest)
    live = _live_files(wanted, manifest)
    missing = [target for target, path in live.items() if not path.exists()]
    refuse_lost_folders(live)
    late = _without_folder(live)
    refuse_taken(connection, server, previous, live)
    left_out = _snapshots_inside(wanted, manifest, folder)

    context.phase("copying")
    journalled = {target: str(path) for target, path in live.items()}
    context.undo("discard_set_aside", live=journalled, operation_id=context.id)
    early = {target: path for target, path in live.items() if target not in late}
    destinations = setaside.prepare(early, context.id)
    way = write_out(context, folder, manifest, destinations, formats_of(wanted))

    context.phase("swapping")
    swapped = {"live": journalled, "operation_id": context.id, "uuid": server.domain_uuid}
    steps: list[Step] = [("swap_back", {**swapped, "missing": missing})]
    if domain and saved:
        ours = {"uuid": domain.uuid, "resumed": True, "boot": domain.boot}
        steps.append(("stop_domain", ours))
    state = _stop(
        context, server, domain, previous, started_by, live, steps, defines=wanted != previous
    )
    _prepare_late(context, folder, manifest, late)
    setaside.swap(late | live, context.id)  # what is late comes first
    domain = _define(context, server, previous, wanted, autostart=manifest.autostart)
    if saved:
        state = _resume(context, domain, saved)
    else:
        _start(domain, state)
    moved = bool(previous and previous != wanted and _some_exist(previous, manifest))
    set_aside = moved or bool(setaside.swapped(live, context.id))
    links = linked.links_of(clone, wanted)
    return Replaced(
        context.id, journalled, previous, set_aside, missing, way, state, links, left_out
    )


def _find(connection: Any, server: Server) -> Domain | None:
    try:
        return domains.find(connection, server.domain_uuid)
    except DomainMissing:
        return None


def _has_the_same_disks(current: str, manifest: Manifest, stored: str) -> bool:
    paths = paths_of(current)
    was = paths_of(stored)
    return all(paths.get(target) == was.get(target) for target in targets_of(manifest))


def _some_exist(definition: str, manifest: Manifest) -> bool:
    paths = paths_of(definition)
    return any(Path(paths.get(target) or "").is_file() for target in targets_of(manifest))


def _snapshots_inside(definition: str, manifest: Manifest, folder: Path) -> list[dict[str, str]]:
    """The disks whose image holds snapshots that the copy's does not: they go with what it is."""
    stored = {disk.target: folder / disk.file for disk in manifest.disks}
    formats = {disk.target: disk.format for disk in manifest.disks}
    found = []
    for disk in DomainDefinition.parse(definition).disks:
        with contextlib.suppress(OSError):  # what cannot be read is what is to be replaced
            if (
                disk.target in stored
                and images.has_snapshots_inside(Path(disk.path or ""), disk.format)
                and not images.has_snapshots_inside(stored[disk.target], formats[disk.target])
            ):
                found.append({"target": disk.target, "reason": images.INSIDE_NOT_COPIED})
    return found


def _known_by(definition: str) -> tuple[str, dict[str, str | None]]:
    return DomainDefinition.parse(definition).name, paths_of(definition)


def _live_files(definition: str, manifest: Manifest) -> dict[str, Path]:
    """Where each file of the copy goes, with symbolic links resolved."""
    paths, domain = paths_of(definition), DomainDefinition.parse(definition)
    live = {target: Path(paths[target] or "").resolve() for target in targets_of(manifest)}
    if manifest.nvram and domain.nvram_path:  # the server may have lost it since, as its TPM
        live[NVRAM] = Path(domain.nvram_path).resolve()
    if manifest.tpm and domain.tpm_state:
        live[TPM] = (settings().swtpm / domain.tpm_state).resolve()
    return live


def _without_folder(live: dict[str, Path]) -> dict[str, Path]:
    """The TPM's state, by TPM, where its directory went with the domain.

    Raises TpmFolderMissing where that cannot be made.
    """
    if TPM not in live or live[TPM].parent.is_dir():
        return {}
    folder, swtpm = live[TPM].parent, settings().swtpm.resolve()
    if not swtpm.is_dir() or not folder.is_relative_to(swtpm):
        raise TpmFolderMissing(
            f"The copy holds the state of the server's TPM, and {folder}, where that belongs, is "
            "no directory here. Nothing was changed; make it, or mount it into the workers' "
            "containers, and ask again."
        )
    return {TPM: live[TPM]}


def _prepare_late(
    context: Context, folder: Path, manifest: Manifest, late: dict[str, Path]
) -> None:
    """Make the TPM's directory, with the new state prepared in it.

    With one that holds no state libvirt starts a server with a TPM that has no certificates
    (decision 0034): it is made when the server is off, and its state is live a moment later.
    """
    for path in late.values():
        make_state_folder(path.parent, settings().swtpm.resolve())
    for target, path in setaside.prepare(late, context.id).items():
        copy_small(folder / manifest.beside[target], path)


def _stop(
    context: Context,
    server: Server,
    domain: Domain | None,
    previous: str | None,
    started_by: str,
    live: dict[str, Path],
    steps: Sequence[Step],
    *,
    defines: bool,
) -> State:
    """Stop the server and make sure that nobody uses its disks; returns its state before.

    The copying took its time, so all that was checked before it is checked again. Before that
    `steps`, which undo what follows, are written down, with what starts the server again and, if
    it `defines` it anew, what puts its definition back: while it is off, no database is waited
    for.
    """
    now_there = _find(connect(settings().libvirt_uri), server)
    seen = now_there.definition() if now_there else None
    if (seen and _known_by(seen)) != (previous and _known_by(previous)):
        raise ServerChanged(
            f"{server.name} was given other disks, renamed, defined or undefined by somebody "
            "meanwhile. Its disks and its state are as that left them; ask again."
        )
    refuse_taken(connect(settings().libvirt_uri), server, previous, live)
    state: State = "stopped"
    steps = list(steps)
    if seen and defines:
        steps.insert(1, ("define_domain", {"xml": seen}))
    if domain:
        refuse_unsafe(domain, started_by, live)
        state = domain.wanted_state
        if state != "stopped":
            steps.insert(0, ("start_domain", {"uuid": domain.uuid, "paused": state == "paused"}))
    context.undo_all(*steps)
    if domain and state != "stopped":
        domain.destroy()
        faults.point("stopped")
    try:
        refuse_if_open(live.values(), "replaced")
    finally:
        _refuse_started(domain)  # who has them open then
    return state


def _define(
    context: Context,
    server: Server,
    previous: str | None,
    wanted: str,
    *,
    autostart: bool = False,
) -> Domain:
    connection = connect(settings().libvirt_uri)
    if previous is None:
        context.undo("undefine_domain", uuid=server.domain_uuid, keep_nvram=True, keep_tpm=True)
    elif wanted == previous:
        return domains.find(connection, server.domain_uuid)
    domain = domains.define(connection, wanted)
    if previous is None and autostart:
        domain.start_with_host()
    faults.point("defined")
    return domain


def _refuse_started(domain: Domain | None) -> None:
    """Raise ServerChanged where somebody started the domain after `_stop`, on whichever disks. Of
    those that go it is taken off by what undoes the swap."""
    if domain and domain.is_active:
        raise ServerChanged(
            f"{domain.name} was started by somebody while its disks were about to be replaced. It "
            "runs on the disks that it had; ask again."
        )


def _start(domain: Domain, state: State) -> None:
    _refuse_started(domain)
    if state != "stopped":
        domain.start(paused=state == "paused", discard_saved_state=True)
        faults.point("started")


def _resume(context: Context, domain: Domain, saved: Path) -> State:
    if domain.is_active:  # it is not ours
        context.strike("stop_domain")
    _refuse_started(domain)
    resume_from(domain, saved, check=context.check)
    faults.point("started")
    return "running"


def undo(context: Context, operation_id: str) -> Outcome:
    """Put back what a revert or restore set aside; the state it brought is dropped."""
    with reading() as session:
        operation = lookups.operation(session, operation_id)
        refuse_if_not_undoable(operation)
        server = lookups.server(session, operation.server_id, forgotten=True)
    record = operation.undo or {}
    live = {target: Path(path) for target, path in record["live"].items()}
    connection = connect(settings().libvirt_uri)
    domain = domains.find(connection, server.domain_uuid)
    current = domain.definition()
    kept = {target: path for target, path in live.items() if target not in record["missing"]}
    setaside.refuse_lost(kept, operation_id)
    clone = linked.clone_of(server.id)

    context.phase("swapping")
    before = renamed(record["previous"] or current, domain.name)
    swapped = {"live": record["live"], "operation_id": operation_id, "uuid": server.domain_uuid}
    there = [Path(path) for target, path in paths_of(before).items() if path and target in live]
    elsewhere = [str(path) for path in there if path not in live.values()]
    steps: list[Step] = [("swap_again", {**swapped, "elsewhere": elsewhere})]
    state = _stop(context, server, domain, current, before, live, steps, defines=before != current)
    setaside.swap_back(live, operation_id)
    # A TPM that had no state would begin anew without what its maker gives it (decision 0034).
    had_none = [target for target in record["missing"] if target != TPM]
    setaside.take_away({target: live[target] for target in had_none}, operation_id)
    domain = _define(context, server, current, before)
    _start(domain, state)
    links = linked.links_of(clone, before, record.get(linked.STOOD_ON, ()))

    def apply(session: Session) -> list[Step]:
        events.emit(session, "operation.undone", server.id, operation=operation_id)
        if links:
            links.write(session)
        return [discarded(session, operation_id)]

    return Outcome({"undone": operation_id, "state": state}, apply)


def forget(context: Context, operation_id: str) -> Outcome:
    """Drop what a revert or restore set aside; it can then no longer be undone."""

    def apply(session: Session) -> list[Step]:
        operation = lookups.operation(session, operation_id)
        return withdrawn(session, operation) if operation.undo else []

    context.phase("deleting")
    return Outcome({"forgotten": operation_id}, apply)


def withdrawn(session: Session, operation: Operation) -> list[Step]:
    """Take back that the operation can be undone; the steps that are returned remove the files,
    and the base that was kept for them alone."""
    stood_on = (operation.undo or {}).get(linked.STOOD_ON, ())
    step = discarded(session, operation.id)
    return [step, *linked.release_dropped(session, operation.server_id, stood_on)]


def discarded(session: Session, operation_id: str) -> Step:
    """Take back that the operation can be undone; the step that is returned removes the files."""
    operation: Operation = lookups.operation(session, operation_id)
    live = (operation.undo or {})["live"]
    operation.undo = operation.undo_until = None
    session.add(operation)
    return "discard_set_aside", {"live": live, "operation_id": operation_id}
