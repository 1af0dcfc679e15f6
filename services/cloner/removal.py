"""The story of the end of clones: stopped, their files set aside, their rows, and only then gone.

A deletion destroys data, so it goes by what is known, and leaves the rest: the domain whose UUID
the clone's server has, and the files that were recorded when the clone was made. A disk that the
domain was given later, or that another domain needs, stays, and the result says so.

check ── stop ── set files aside by rename ──┤commit├── undefine ── unlink
              undone up to here ▲                     ▲ finished from here on
"""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import and_, or_, select
from sqlmodel import Session

from services.cloner.farms import Member, at_once, hold, members, refuse_if_none
from shared import errors, events, farms, faults, forgetting, linked, lookups, mounted, using
from shared.commands import DeleteClone, DeleteFarm
from shared.copying import vault
from shared.database import now, reading, transaction
from shared.disks import removal, setaside
from shared.disks.errors import ServerChanged
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import DomainMissing
from shared.hypervisor.inventory import files_of
from shared.hypervisor.locks import refuse_if_open
from shared.models import Clone, Farm, Operation, Server
from shared.operations import journal
from shared.operations.context import Context, Outcome
from shared.operations.journal import Step
from shared.operations.runner import handles
from shared.replaceable import ServerTransient
from shared.settings import settings
from shared.using import Users


class Leaving(Member):
    """A clone that is to go."""

    def __init__(self, clone: Clone, server: Server) -> None:
        super().__init__(clone, server)
        self.found: Domain | None = None
        self.state: State = "stopped"
        self.has: set[str] = set()
        """The files that its domain had when it was looked at."""
        self.files: list[Path] = []
        """What goes."""
        self.strangers: list[str] = []
        """What its domain got later."""
        self.kept: set[Path] = set()
        """That, and all that it depends on."""
        self.stood_on: set[str] = set(clone.linked_to)
        """The bases that its disks stand on, or those that its reverts set aside."""
        self.told = {"left": []}

    def leave(self, path: Path | str, reason: str) -> None:
        left = {"path": str(path), "reason": reason}
        if left not in self.told["left"]:  # a commit may be tried twice
            self.told["left"].append(left)

    def starting(self) -> Step:
        paused = self.state == "paused"
        return "start_domain", {"uuid": self.server.domain_uuid, "paused": paused}


@handles(DeleteFarm)
def delete(context: Context, command: DeleteFarm) -> Outcome:
    """Delete the VMs of a farm, and what was made for them."""
    with transaction() as session:
        row = select(Farm).where(Farm.id == command.farm)  # type: ignore[arg-type]
        farm = session.scalars(row.with_for_update()).one()
        if command.expired and (farm.expires_at is None or farm.expires_at > now()):
            return Outcome({"farm": farm.id, "clones": [], "expires_at": _told(farm.expires_at)})
        leaving = [Leaving(each.clone, each.server) for each in members(session, farm.id)]
    return _delete(context, farm.id, leaving, expired=command.expired)


@handles(DeleteClone)
def delete_clone(context: Context, command: DeleteClone) -> Outcome:
    """Delete one clone; one that is gone already, or was never made, needs no work."""
    with reading() as session:
        clone = session.get_one(Clone, command.clone)
        ready = members(session, clone.farm_id or "")
        leaving = [Leaving(each.clone, each.server) for each in ready if each.clone.id == clone.id]
    return _delete(context, clone.farm_id or "", leaving, only=clone.id)


def _told(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _delete(
    context: Context,
    farm_id: str,
    leaving: list[Leaving],
    *,
    only: str | None = None,
    expired: bool = False,
) -> Outcome:
    context.phase("checking")
    mounted.ensure()  # a clone's snapshot goes with it
    leaving = hold(context, leaving)
    connection = connect(settings().libvirt_uri)
    users = using.users(connection) if leaving else {}
    for each in leaving:
        if not each.failed:
            _trying(each, partial(_look, each, users))
    if _stop(context, leaving):  # which takes its time
        users = using.users(connect(settings().libvirt_uri))
    for number, each in enumerate(leaving, start=1):
        if not each.failed:
            context.phase(f"clone {number} of {len(leaving)}: {each.clone.name}")
            _trying(each, partial(_set_aside, context, each, users))

    outcome = Outcome({"farm": farm_id, "clones": []})

    def apply(session: Session) -> list[Step]:
        moment = now()
        gone = [each for each in leaving if not each.failed]
        steps = [step for each in gone for step in _gone(session, each, context.id, moment)]
        steps += _release(session, gone, users)
        _end(session, farm_id, only, moment, expired)
        outcome.result["clones"] = [each.outcome("deleted") for each in leaving]
        # A vault that has gone meanwhile holds up what comes after it.
        return sorted(steps, key=lambda step: step[0] == "remove_copy")

    outcome.apply = apply
    return refuse_if_none([*leaving], outcome)


def _trying(each: Leaving, do: Callable[[], None]) -> None:
    try:
        do()
    except (errors.Cancelled, errors.LeaseLost):
        raise
    except Exception as error:
        each.fail(error)


def _look(each: Leaving, users: Users) -> None:
    """Find the domain, and sort out which files go."""
    made = [Path(path) for path in each.clone.files or []]
    strangers: dict[str, str] = {}
    try:
        each.found = domain = each.domain()
    except DomainMissing:
        pass
    else:
        if not domain.is_persistent:
            raise ServerTransient(
                f"{domain.name} is transient: once stopped it could not be started again, should "
                "its deletion fail. It was left as it was; stop it by hand, then ask again."
            )
        each.state = domain.wanted_state
        each.has = set(files_of(domain))
        strangers = using.strangers(domain, [*made, *map(Path, each.clone.linked_to)])
    each.strangers, each.kept = sorted(strangers), using.needed(strangers)
    for stranger in strangers:
        each.leave(
            stranger, "the domain got it later, or it was not recorded that it is the clone's"
        )
    for path in made:
        if path.resolve() in each.kept:
            each.leave(path, "a disk that the domain got later depends on it")
        elif others := _others(each, path, users):
            each.leave(path, f"domain {others} needs it")
        elif removal.is_plain(path):
            each.files.append(path)
        elif path.exists() or path.is_symlink():
            each.leave(path, "it is no plain file any more")


def _others(each: Leaving, path: Path, users: Users) -> str:
    """The names of the domains, but the clone's own, that need a file."""
    needing = users.get(path.resolve(), {}).items()
    return ", ".join(sorted(name for uuid, name in needing if uuid != each.server.domain_uuid))


def _stop(context: Context, leaving: list[Leaving]) -> bool:
    """Force the domains off, all at once; should it come to that, they are started again. Whether
    any was on."""
    on = [each for each in leaving if not each.failed and each.state != "stopped"]
    if not on:
        return False
    context.phase(f"stopping {len(on)} clones")
    for each in on:  # in a unit of its own: one that cannot start again keeps no other off
        with context.unit(each.clone.id):
            context.undo_all(each.starting(), durable=each is on[-1])  # the last takes all along
    at_once(on, lambda each: None if context.stopping() else each.domain().destroy())
    context.leftovers += [each.clone.id for each in on if each.failed]
    faults.point("clones:stopped")
    context.check()
    return True


def _set_aside(context: Context, each: Leaving, users: Users) -> None:
    """Take the clone's files from under their names, if nothing has come between."""
    with context.unit(each.clone.id):
        if each.found and (each.found.is_active or not set(files_of(each.found)) <= each.has):
            raise ServerChanged(
                f"{each.clone.name} was started, given other disks or defined anew by somebody "
                "meanwhile, so it was not deleted. Look at what was done, then ask again."
            )
        for path in each.files:
            if others := _others(each, path, users):
                raise ServerChanged(
                    f"{path} is needed by domain {others}, which was defined meanwhile, so "
                    f"{each.clone.name} was not deleted. Look at what was done, then ask again."
                )
        refuse_if_open(each.files, "removed")
        arguments = {"files": [*map(str, each.files)], "operation_id": context.id}
        context.undo("give_back", **arguments)
        removal.set_aside(each.files, context.id)
        faults.point("clone:aside")


def _gone(session: Session, each: Leaving, operation_id: str, moment: datetime) -> list[Step]:
    """Mark the clone and its server as gone, with what hangs on them; what is left to do."""
    server = session.get_one(Server, each.server.id)
    snapshot = lookups.snapshot_of(session, server.id)
    left = forgetting.forget(session, server, moment)
    each.told |= {"snapshot": snapshot and snapshot.id, "images_kept": left.images}
    events.emit(
        session,
        "clone.deleted",
        server.id,
        clone=each.clone.id,
        name=each.clone.name,
        farm=each.clone.farm_id,
        left=each.told["left"],
    )
    steps: list[Step] = [
        ("undefine_domain", {"uuid": server.domain_uuid, "keep_nvram": True}),
        (
            "discard_removed",
            {
                "files": [*map(str, each.files)],
                "operation_id": operation_id,
                "kept": _set_aside_before(session, each),
            },
        ),
    ]
    if each.strangers and each.stood_on:  # what they stand on is asked when others go
        clone = session.get_one(Clone, each.clone.id)
        clone.files = [*(clone.files or []), *each.strangers]
        clone.linked_to = sorted({*clone.linked_to, *each.stood_on})
    if snapshot:
        snapshot.deleted_at = moment
        events.emit(session, "snapshot.deleted", server.id, snapshot=snapshot.id)
        folder = vault().folder("snapshot", server.id, snapshot.id)
        steps.append(("remove_copy", {"folder": str(folder)}))
    return steps


def _release(session: Session, gone: list[Leaving], users: Users) -> list[Step]:
    """What removes the bases that went with these, but those that a disk depends on which stays,
    or that another domain needs: a VM that was of the farm until its server was forgotten, or one
    that got a copy of an overlay."""
    going = {each["uuid"] for each in journal.left_to_do(session, "undefine_domain")}
    going |= {each.server.domain_uuid for each in gone}
    steps: list[Step] = []
    stood_on = {path for each in gone for path in each.stood_on}
    for path in linked.release(session, [each.clone for each in gone], stood_on):
        base = Path(path).resolve()
        if keeping := [each for each in gone if base in each.kept]:
            keeping[0].leave(path, "a disk that the domain got later depends on it")
            continue
        last = next(each for each in gone if path in each.stood_on)
        needing = users.get(base, {})
        if names := sorted(name for uuid, name in needing.items() if uuid not in going):
            last.leave(path, f"domain {', '.join(names)} needs it")
        steps.append(("remove_base", {"path": path}))  # which looks again
    return steps


def _set_aside_before(session: Session, each: Leaving) -> list[str]:
    """What reverts and restores of the server keep, which nobody can ask for any more."""
    row: Any = Operation
    query = select(Operation).where(row.server_id == each.server.id, row.undo_until.is_not(None))
    kept: list[str] = []
    for operation in session.scalars(query):
        for path in map(Path, (operation.undo or {}).get("live", {}).values()):
            kept.append(str(setaside.old_path(path, operation.id)))
            kept.append(str(setaside.new_path(path, operation.id)))
        each.stood_on.update((operation.undo or {}).get(linked.STOOD_ON, ()))
        operation.undo = operation.undo_until = None
    return kept


def _end(session: Session, farm_id: str, only: str | None, moment: datetime, expired: bool) -> None:
    """What was never made goes with the rest: it is a row and no more. So does an empty farm.

    That counts also for what a retry, asked for after this deletion, waits to make.
    """
    row: Any = Clone
    operation: Any = Operation
    farm = session.get(Farm, farm_id, with_for_update=True)
    waiting = select(operation.id).where(operation.state == "queued")
    never = select(Clone).where(
        row.farm_id == farm_id,
        or_(
            row.state.in_(farms.FAILED),
            and_(row.state == "queued", row.operation_id.in_(waiting)),
        ),
    )
    for clone in session.scalars(never):
        if only in (None, clone.id):
            clone.state = "deleted"
    session.flush()
    if farm:
        farms.end_if_empty(session, farm, moment, expired=expired)
