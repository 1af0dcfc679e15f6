"""The story of a snapshot: taken, reverted to (and undone), deleted."""

from sqlmodel import Session

from shared import errors, events, lookups, restoring
from shared.commands import DeleteSnapshot, ForgetRevert, RevertSnapshot, TakeSnapshot, UndoRevert
from shared.copying import copy_server, vault
from shared.database import now, reading
from shared.ids import new_id
from shared.manifest import ManifestAbout
from shared.models import Snapshot
from shared.operations.context import Context, Outcome
from shared.operations.journal import Step
from shared.operations.runner import handles


@handles(TakeSnapshot)
def take(context: Context, command: TakeSnapshot) -> Outcome:
    """Take a snapshot; with `replace` the old one goes after the new one is whole (S1)."""
    with reading() as session:
        server = lookups.server(session, command.server)
        if (existing := lookups.snapshot_of(session, server.id)) and not command.replace:
            raise errors.SnapshotExists(
                f"Server {server.name!r} has got a snapshot meanwhile; nothing was taken. "
                "Ask with `replace: true` to replace it.",
                conflict=existing.id,
            )
    snapshot_id = new_id("snp")
    about = ManifestAbout(description=command.description)
    stored = copy_server(
        context,
        server,
        "snapshot",
        snapshot_id,
        quiesce=command.quiesce,
        about=about,
        memory=command.with_memory,
    )
    snapshot = stored.snapshot_row()

    def apply(session: Session) -> list[Step]:
        left_to_do: list[Step] = []
        if existing:
            left_to_do.append(_removal(session, session.merge(existing)))
            session.flush()  # the old row steps aside before the unique index sees the new one
        session.add(snapshot)
        events.emit(
            session,
            "snapshot.taken",
            server.id,
            snapshot=snapshot_id,
            **stored.facts(),
        )
        return left_to_do

    return Outcome({"snapshot": snapshot_id, **stored.facts()}, apply)


def _removal(session: Session, snapshot: Snapshot) -> Step:
    """Mark the row as gone; the step that is returned removes the files."""
    snapshot.deleted_at = now()
    session.add(snapshot)
    folder = vault().folder("snapshot", snapshot.server_id, snapshot.id)
    return "remove_copy", {"folder": str(folder)}


@handles(DeleteSnapshot)
def delete(context: Context, command: DeleteSnapshot) -> Outcome:
    """Delete the snapshot that was meant; one that is gone already needs no work."""

    def apply(session: Session) -> list[Step]:
        snapshot = lookups.snapshot_of(session, command.server)
        if snapshot is None or snapshot.id != command.snapshot:
            return []
        fact = "snapshot.expired" if command.expired else "snapshot.deleted"
        events.emit(session, fact, command.server, snapshot=snapshot.id)
        return [_removal(session, snapshot)]

    context.phase("deleting")
    if command.snapshot:
        vault().refuse_read_only(vault().folder("snapshot", command.server, command.snapshot))
    return Outcome({"snapshot": command.snapshot}, apply)


@handles(RevertSnapshot)
def revert(context: Context, command: RevertSnapshot) -> Outcome:
    """Put the server's disks back as they were in its snapshot (S4); it can be undone (E1).

    Where the snapshot holds the memory, the guest goes on at that very instant (S5).
    """
    with reading() as session:
        server = lookups.server(session, command.server)
        snapshot = lookups.snapshot(session, server, command.snapshot)
    folder = vault().folder("snapshot", server.id, snapshot.id)
    replaced = restoring.put_back(
        context, server, folder, definition="current", memory=command.with_memory
    )

    def apply(session: Session) -> None:
        events.emit(session, "snapshot.reverted", server.id, snapshot=snapshot.id)

    return replaced.outcome({"snapshot": snapshot.id}, apply)


@handles(UndoRevert)
def undo(context: Context, command: UndoRevert) -> Outcome:
    return restoring.undo(context, command.operation)


@handles(ForgetRevert)
def forget(context: Context, command: ForgetRevert) -> Outcome:
    return restoring.forget(context, command.operation)
