"""What came of an operation, in a sentence or a few: the way, the pause, where, what next."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from triptych.cli.render import (
    between,
    distance,
    duration,
    moment,
    parse,
    part_of,
    size,
    with_reason,
)
from triptych.client import Client
from triptych.problem import Problem
from triptych.types import Image, Operation, Snapshot

WAYS = {
    "reflink": "by reflink",
    "overlay": "through an overlay",
    "stream": "as a stream",
}
NOT_ITS_OWN = {
    "kept": "still as its source has them",
    "pending": "still to be renewed",
    "left_out": "left out",
}
"""What is told of a clone's identity, in words."""
BAD_CHECKS = ("failed", "damaged", "mismatch", "missing")


@dataclass(frozen=True)
class Outcome:
    """`good` is False where the operation succeeded but what it was for did not."""

    text: str
    good: bool = True
    proof: str | None = None
    """Of a verify: `proven`, `failed` or `not_run`."""


def tell(client: Client, operation: Operation, subject: str | None) -> Outcome:
    """The outcome of a successful operation. `subject` is what the user called the thing."""
    kind = operation.get("kind") or ""
    result = operation.get("result") or {}
    name = subject or _subject(client, operation)
    if kind.endswith(".undo"):
        return _with_undo(operation, f"Undone: {name} is as it was before.")
    teller = TELLERS.get(kind)
    if teller is None:
        return _with_undo(operation, f"Done: {kind or 'operation'} of {name}{_where(operation)}.")
    outcome = teller(client, operation, result, name)
    return replace(outcome, text=_with_undo(operation, outcome.text).text)


def _taken(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    server = operation.get("server") or name
    snapshot = cast(Snapshot, _look(lambda: client.snapshots.get(server)) or dict(result))
    text = f"Snapshot of {name} taken{_where(operation)}{_took(operation)}{_copied(snapshot)}"
    if snapshot.get("with_memory"):
        text += " It holds the memory too."
    if expires := snapshot.get("expires_at"):
        text += f" It is kept until {moment(expires)} ({distance(expires)})."
    return Outcome(f"{text} Go back to it with `triptych snapshot revert {name}`.")


def _reverted(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    return Outcome(f"{name} is back at its snapshot{_where(operation)}{_took(operation)}.")


def _snapshot_deleted(
    client: Client, operation: Operation, result: dict[str, Any], name: str
) -> Outcome:
    return Outcome(f"The snapshot of {name} is deleted.")


def _imaged(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    image = _image(client, result)
    called = image.get("name") or str(result.get("image") or "")
    text = f"Image {called} of {name} made{_where(operation)}{_took(operation)}{_copied(image)}"
    left_out = image.get("left_out") or []
    if left_out:
        text += f" Left out: {', '.join(with_reason(each) for each in left_out)}."
    return Outcome(f"{text} Go back to it with `triptych image restore {called}`.")


def _restored(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    server = result.get("server") or operation.get("server")
    what = f" (server {server})" if server else ""
    return Outcome(f"Image {name} is restored{what}{_where(operation)}{_took(operation)}.")


def _image_deleted(
    client: Client, operation: Operation, result: dict[str, Any], name: str
) -> Outcome:
    return Outcome(f"Image {name} is deleted.")


def _verified(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    image = _image(client, result, name)
    checked = (image.get("verified") or {}).get("result")
    proof = image.get("proof") or {}
    # Only a proof that this operation made counts for it.
    fresh = not proof.get("at") or _since(operation, proof.get("at"))
    proven = (proof.get("result") or "not_run") if fresh else "not_run"
    bad = image.get("state") in BAD_CHECKS or checked in BAD_CHECKS or proven == "failed"
    text = f"Image {name} was verified{_where(operation)}{_took(operation)}:"
    text += f" {checked or image.get('state') or 'complete'}."
    reason = f" ({proof['reason']})" if fresh and proof.get("reason") else ""
    text += f" Boot proof: {proven.replace('_', ' ')}{reason}."
    return Outcome(text, not bad, proven)


def _cloned(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    retried = operation.get("kind") == "farm.retry"
    outcome = _each(operation, result, f"of {name} made{' again' if retried else ''}")
    if retried and (taken := result.get("taken_at")):
        text = f"{outcome.text}\nThey are of another instant than the farm's: {moment(taken)}."
        return replace(outcome, text=text)
    if not outcome.good:
        text = f"{outcome.text}\nMake those that failed again: triptych farm retry {_farm(result)}"
        return replace(outcome, text=text)
    return outcome


def _started(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    return _each(operation, result, f"of {name} started")


def _stopped(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    return _each(operation, result, f"of {name} stopped")


def _deleted(client: Client, operation: Operation, result: dict[str, Any], name: str) -> Outcome:
    return _each(operation, result, f"of {name} deleted")


def _each(operation: Operation, result: dict[str, Any], what: str) -> Outcome:
    """A farm's outcome, clone by clone; good if all of them are."""
    clones = result.get("clones") or []
    failed = [each for each in clones if each.get("error") or each.get("state") == "failed"]
    made = len(clones) - len(failed)
    count = f"{made} of {len(clones)} clones" if failed else _count(made, "clone")
    text = f"{count} {what}{_where(operation)}{_took(operation)}."
    for each in clones:
        text += f"\n  {each.get('name') or each.get('id')}: {_clone_words(each)}"
    if reasons := _reasons(clones):
        text += "\nWhy:" + "".join(f"\n  {each}" for each in reasons)
    bases = {path for each in clones for path in each.get("linked_to") or ()}
    if bases:
        text += f"\nThey stand on {', '.join(sorted(bases))}, which must stay."
    if reason := result.get("not_linked"):
        text += f"\nNot linked: {reason}."
    return Outcome(text, not failed)


def _farm(result: dict[str, Any]) -> str:
    return str(result.get("farm") or "FARM")


TELLERS: dict[str, Callable[[Client, Operation, dict[str, Any], str], Outcome]] = {
    "snapshot.take": _taken,
    "snapshot.revert": _reverted,
    "snapshot.delete": _snapshot_deleted,
    "snapshot.promote": _imaged,
    "image.create": _imaged,
    "image.restore": _restored,
    "image.delete": _image_deleted,
    "image.verify": _verified,
    "clone.create": _cloned,
    "clone.delete": _deleted,
    "farm.retry": _cloned,
    "farm.start": _started,
    "farm.stop": _stopped,
    "farm.delete": _deleted,
}


def _with_undo(operation: Operation, text: str) -> Outcome:
    until = operation.get("undo_until")
    if until:
        text += (
            f" What it replaced is set aside until {moment(until)}: "
            f"`triptych operation undo {operation['id']}` brings it back."
        )
    return Outcome(text)


def _copied(copy: Snapshot | Image) -> str:
    """The way, the pause, consistency and size of a copy, as far as they are known."""
    way = copy.get("way")
    text = f", {WAYS.get(way, f'by {way}')}." if way else "."
    pause = copy.get("pause_ms")
    if pause:
        text += f" The guest was paused for {pause:.0f} ms."
    elif way:
        text += " The guest was not paused."
    facts = []
    if consistency := copy.get("consistency"):
        facts.append(f"is {consistency} consistent")
    if (count := copy.get("bytes")) is not None:
        facts.append(f"holds {size(count)}")
    return f"{text} It {' and '.join(facts)}." if facts else text


def _since(operation: Operation, at: str | None) -> bool:
    start = operation.get("started_at")
    return bool(start and at and parse(at) >= parse(start))


def _where(operation: Operation) -> str:
    host = operation.get("host")
    return f" on host {host}" if host else ""


def _took(operation: Operation) -> str:
    end = operation.get("finished_at")
    seconds = between(operation.get("started_at"), end) if end else None
    return "" if seconds is None else f" in {duration(seconds)}"


def _subject(client: Client, operation: Operation) -> str:
    """The server's name where it can be had, else what the operation itself knows."""
    server = operation.get("server")
    if not server:
        return operation["id"]
    found = _look(lambda: client.servers.get(server))
    return str((found or {}).get("name") or server)


def _image(client: Client, result: dict[str, Any], name: str | None = None) -> Image:
    reference = result.get("image") or name
    found = _look(lambda: client.images.get(str(reference))) if reference else None
    return cast(Image, found or {})


def _look(read: Callable[[], Any]) -> Any:
    """Details make the sentence richer; their absence is no failure of the operation."""
    try:
        return read()
    except Problem:
        return None


def _clone_words(clone: dict[str, Any]) -> str:
    error = clone.get("error")
    if isinstance(error, dict):
        error = ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))
    if error:
        return f"failed: {error}"
    words = [str(clone.get("power") or clone.get("state") or "made")]
    if clone.get("forced"):
        words.append("its power was cut")
    if clone.get("snapshot"):
        words.append("its snapshot is deleted too")
    if images := clone.get("images_kept"):
        words.append(f"{_count(images, 'image')} of it kept")
    words += [f"left {each['path']} ({each['reason']})" for each in clone.get("left") or []]
    parts = [
        f"; {what}: {', '.join(map(part_of, each))}"
        for key, what in NOT_ITS_OWN.items()
        if (each := _identity(clone, key))
    ]
    return ", ".join(words) + "".join(parts)


def _identity(clone: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return (clone.get("identity") or {}).get(key) or []


def _reasons(clones: list[dict[str, Any]]) -> list[str]:
    """Why parts of the clones' identities are not their own, each reason once."""
    told = (
        f"{part_of(part)}: {part['reason']}"
        for clone in clones
        for key in NOT_ITS_OWN
        for part in _identity(clone, key)
        if part.get("reason")
    )
    return list(dict.fromkeys(told))


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
