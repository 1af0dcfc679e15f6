"""The story of a farm once it is made: started and stopped as one, its failed clones made again.

Each clone has its own outcome; one that fails leaves the others alone. Starting and stopping are
not undone: a guest that has gone down is not brought back by booting it. What a crash or a cancel
leaves is what was reached by then, and to ask again goes on from there. Deleting is `removal.py`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlalchemy import select
from sqlmodel import Session

from services.cloner import clones, identity
from shared import errors, events, faults
from shared.commands import CreateClones, RetryFarm, StartFarm, StopFarm
from shared.database import reading, transaction
from shared.hypervisor import domains
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import Domain, State
from shared.hypervisor.errors import LibvirtFailed
from shared.models import Clone, Farm, Server
from shared.operations import holds
from shared.operations.claim import held
from shared.operations.context import Context, Outcome
from shared.operations.patience import patiently
from shared.operations.runner import describe, handles
from shared.settings import settings
from shared.turns import MOST_CALLS

log = structlog.get_logger()

LOOK_S = 0.25
ASK_AGAIN_S = 10.0


class Member:
    """A clone of a farm with its server, and what came of it."""

    def __init__(self, clone: Clone, server: Server) -> None:
        self.clone = clone
        self.server = server
        self.error: dict[str, str] | None = None
        self.told: dict[str, Any] = {}
        """More of the outcome."""

    @property
    def failed(self) -> bool:
        return self.error is not None

    def domain(self) -> Domain:
        """The clone's own domain, by its UUID: a name may be another's by now. Raises
        DomainMissing."""
        return domains.find(connect(settings().libvirt_uri), self.server.domain_uuid)

    def fail(self, error: Exception) -> None:
        self.error = describe(error)
        log.warning("clone.left_as_it_was", clone=self.clone.name, **self.error)

    def outcome(self, state: str) -> dict[str, Any]:
        return {
            "id": self.clone.id,
            "name": self.clone.name,
            "server": self.server.id,
            "state": "failed" if self.failed else state,
            **self.told,
            "error": self.error,
        }


AMember = TypeVar("AMember", bound=Member)


def members(session: Session, farm_id: str) -> list[Member]:
    """The farm's clones that were made and are not deleted, by name."""
    clone: Any = Clone
    server: Any = Server
    query = (
        select(Clone, Server)
        .join(Server, server.id == clone.server_id)
        .where(clone.farm_id == farm_id, clone.state == "ready", server.forgotten_at.is_(None))
    )
    return [Member(*each) for each in session.execute(query.order_by(clone.name))]


def hold(context: Context, all_of: list[AMember]) -> list[AMember]:
    """Keep all other work off the servers until this operation ends; those that have work of
    their own have failed here and now.

    Returns those that are clones still: until they are held, a server can be forgotten.
    """
    own = context.operation.server_id
    others = [each.server.id for each in all_of if each.server.id != own]
    server: Any = Server
    known = select(server.id).where(
        server.id.in_([each.server.id for each in all_of]), server.forgotten_at.is_(None)
    )

    def write() -> tuple[dict[str, str], set[str]]:
        with transaction() as session:
            held(session, context.id, context.owner)
            return holds.hold(session, context.id, others), set(session.scalars(known))

    busy, still = patiently(context.check, write)
    all_of = [each for each in all_of if each.server.id in still]
    for each in all_of:
        if operation_id := busy.get(each.server.id):
            each.fail(
                errors.ServerBusy(
                    f"Operation {operation_id} is at work on server {each.clone.name!r}, or is "
                    "next there, so the server was left as it was. Wait for its end or cancel it, "
                    "then ask again."
                )
            )
    faults.point("farm:held")
    return all_of


def at_once(
    all_of: Iterable[Member], do: Callable[[Member], None], most: int | None = None
) -> list[Member]:
    """Do it to each that has not failed, to `most` at a time, or as many as libvirt takes; one that
    fails then has. Returns those that it was done to."""

    def one(each: Member) -> None:
        try:
            do(each)
        except Exception as error:
            each.fail(error)

    chosen = [each for each in all_of if not each.failed]
    with ThreadPoolExecutor(most or MOST_CALLS) as pool:
        list(pool.map(one, chosen))
    return chosen


def refuse_if_none(all_of: list[Member], outcome: Outcome) -> Outcome:
    """The outcome, unless all have failed: then so has the operation, with what all say, or the
    first."""
    if all_of and all(each.failed for each in all_of):
        first = all_of[0].error or {}
        more = f" So did the {len(all_of) - 1} others." if len(all_of) > 1 else ""
        failure = errors.TriptychError(f"{all_of[0].clone.name}: {first['message']}{more}")
        failure.code = first["code"]
        raise failure
    return outcome


@handles(StartFarm)
def start(context: Context, command: StartFarm) -> Outcome:
    """Start the clones that are off. One that its owner paused stays paused. Those whose identity
    was to be renewed once they run get their own, before anybody sees them."""
    with reading() as session:
        farm = session.get_one(Farm, command.farm)
        all_of = members(session, farm.id)
    all_of = hold(context, all_of)
    context.phase(f"starting {len(all_of)} clones")

    def note(each: Member, told: dict[str, Any]) -> None:
        def write() -> None:
            with transaction() as session:
                held(session, context.id, context.owner)
                session.get_one(Clone, each.clone.id).identity = told

        patiently(context.check_lease, write)
        each.clone.identity = told
        each.told["identity"] = identity.public(told)

    def start_one(each: Member) -> None:
        if context.stopping():
            return
        domain = each.domain()
        if identity.is_put_off(each.clone.identity):
            identity.start_unlinked(domain, each.clone.identity, partial(note, each))
        else:
            domain.start()
        each.told["power"] = domain.state

    def renew_one(each: Member) -> None:
        identity.renew_started(
            each.domain(), each.clone.name, each.clone.identity, partial(note, each), context.check
        )

    at_once(all_of, start_one)
    faults.point("farm:started")
    running = (each for each in all_of if each.told.get("power") == "running")
    waiting = [each for each in running if identity.is_put_off(each.clone.identity)]
    if waiting and not context.stopping():
        context.phase(f"renewing the identity of {len(waiting)} clones")
        at_once(waiting, renew_one, clones.UNDER_WAY)  # they mostly wait for their guests
    _refuse_if_cancelled(context, "started")
    return refuse_if_none(all_of, _powered(farm, all_of, "farm.started"))


@handles(StopFarm)
def stop(context: Context, command: StopFarm) -> Outcome:
    """Have all guests shut down at the same time, and wait; force off the rest only if asked."""
    with reading() as session:
        farm = session.get_one(Farm, command.farm)
        all_of = members(session, farm.id)
    all_of = hold(context, all_of)
    context.phase(f"shutting down {len(all_of)} clones")
    on = _shut_down(context, all_of, command.timeout_s)
    _refuse_if_cancelled(context, "stopped")
    if on and command.force:
        context.phase(f"forcing off {len(on)} clones")
        at_once(on, lambda each: None if context.stopping() else each.domain().destroy())
        faults.point("farm:forced")
        _refuse_if_cancelled(context, "stopped")
    for each in on:
        each.told["forced"] = command.force
        if not command.force:
            each.fail(
                errors.GuestStillOn(
                    f"{each.clone.name} did not shut down within {command.timeout_s} s; it may yet "
                    "do so. Ask again, with a longer `timeout_s`, or with `force: true` "
                    "(`--force`) to cut its power."
                )
            )
    for each in all_of:
        if not each.failed:
            each.told["power"] = "stopped"
    return refuse_if_none(all_of, _powered(farm, all_of, "farm.stopped"))


def _shut_down(context: Context, all_of: list[Member], timeout_s: float) -> list[Member]:
    """Those that are still on so many seconds after all were asked, or are paused, and so cannot
    shut down.

    A guest that was just booting may not have heard it, so each is asked again and again. To ask
    an agent takes until its guest is down, or the agent falls silent, and few are asked at a time:
    what counts in the end is a look of its own.
    """
    deadline, ask_at = math.inf, 0.0
    states: dict[str, State] = {}
    running = on = [each for each in all_of if not each.failed]
    while True:
        over = time.monotonic() >= deadline
        asking = not over and time.monotonic() >= ask_at

        def look(each: Member, asking: bool = asking, until: float = deadline) -> None:
            if context.stopping():
                return
            domain = each.domain()
            states[each.clone.id] = domain.state
            if asking and states[each.clone.id] == "running" and time.monotonic() < until:
                with contextlib.suppress(LibvirtFailed):  # it went down in between, or cannot
                    domain.ask_to_shut_down()

        at_once(running, look)
        faults.point("farm:asked")
        if context.stopping():
            return on
        if asking:
            ask_at = time.monotonic() + ASK_AGAIN_S
            deadline = min(deadline, time.monotonic() + timeout_s)
        on = [each for each in on if not each.failed and states[each.clone.id] != "stopped"]
        running = [each for each in on if states[each.clone.id] == "running"]
        if not running or over:
            return on
        time.sleep(LOOK_S)


def _refuse_if_cancelled(context: Context, done: str) -> None:
    context.check_lease()
    if context.stopping():
        raise errors.Cancelled(
            f"Cancelled on request. Clones that were {done} by then stay so; "
            "`triptych farm show` tells which."
        )


def _powered(farm: Farm, all_of: list[Member], fact: str) -> Outcome:
    def apply(session: Session) -> None:
        done = [each.clone.name for each in all_of if not each.failed]
        events.emit(session, fact, farm.server_id, farm=farm.id, name=farm.name, clones=done)

    result = [each.outcome("ready") for each in all_of]
    return Outcome({"farm": farm.id, "clones": result}, apply)


@handles(RetryFarm)
def retry(context: Context, command: RetryFarm) -> Outcome:
    """Make the clones that failed once more, and no others: they are this operation's now."""
    with reading() as session:
        asked = session.get_one(Farm, command.farm).command
    return clones.create(context, CreateClones.model_validate(asked))
