"""The shapes the API answers with, as plain dictionaries.

The API may add fields at any time; these stay. Times are RFC 3339 strings in UTC,
sizes are bytes, ids are opaque strings.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypedDict, TypeVar

Item = TypeVar("Item")

Quiesce = Literal["auto", "require", "never"]
SourceKind = Literal["server", "snapshot", "image"]
ScheduleKind = Literal["daily", "weekly"]
Require = Literal["complete", "verified"]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

ENDED = ("succeeded", "failed", "cancelled")
"""Operation states after which nothing more happens."""

# What a host or a domain can do is for the host to say: its fields are not pinned here.
Host = dict[str, Any]
Domain = dict[str, Any]


class Page(list[Item]):
    """A list that also knows where the next page starts (`next`, None at the end)."""

    def __init__(self, items: Iterable[Item] = (), next: str | None = None) -> None:
        super().__init__(items)
        self.next = next


class Disk(TypedDict, total=False):
    target: str
    format: str
    path: str
    capacity_bytes: int
    writable: bool


class Server(TypedDict, total=False):
    id: str
    name: str
    host: str
    domain: str
    uuid: str
    state: Literal["running", "stopped", "paused", "missing"]
    vcpus: int | None
    memory_bytes: int | None
    disks: list[Disk]
    snapshot: str | None
    newest_image: str | None


class Forgotten(TypedDict, total=False):
    id: str
    name: str
    forgotten_at: str
    images_kept: int
    images_kept_bytes: int
    schedules_ended: list[ScheduleKind]


class Snapshot(TypedDict, total=False):
    id: str
    server: str
    taken_at: str
    expires_at: str
    with_memory: bool
    consistency: Literal["application", "file-system", "crash"]
    way: Literal["reflink", "overlay", "stream"]
    pause_ms: float | None
    bytes: int
    unique_bytes: int | None
    description: str | None


class Verified(TypedDict, total=False):
    at: str | None
    result: str | None


class Proof(TypedDict, total=False):
    at: str | None
    result: Literal["proven", "failed", "not_run"] | None
    reason: str | None


class Image(TypedDict, total=False):
    id: str
    name: str
    server: str
    created_at: str
    pinned: bool
    origin: Literal["manual", "daily", "weekly", "promoted"]
    state: Literal["complete", "missing", "damaged"]
    way: str
    consistency: str
    pause_ms: float | None
    bytes: int
    unique_bytes: int | None
    verified: Verified | None
    proof: Proof | None
    left_out: list[Any]
    description: str | None


class CloneSource(TypedDict, total=False):
    kind: SourceKind
    id: str


class CloneIdentity(TypedDict, total=False):
    way: str | None
    hostname: str | None
    renewed: list[Any]
    pending: list[Any]
    kept: list[Any]
    left_out: list[Any]


class Clone(TypedDict, total=False):
    id: str
    name: str
    host: str
    server: str | None
    source: CloneSource
    created_at: str
    with_memory: bool
    identity: CloneIdentity | None
    way: str | None
    linked_to: list[str]
    state: str
    error: dict[str, Any] | None
    farm: str | None
    operation: str


class Farm(TypedDict, total=False):
    id: str
    name: str
    host: str
    source: CloneSource
    created_at: str
    expires_in_h: float | None
    expires_at: str | None
    clones: dict[str, int]
    power: dict[str, int]
    operation: str
    items: list[Clone]


class GoingImage(TypedDict, total=False):
    id: str
    name: str
    created_at: str
    bytes: int


class Schedule(TypedDict, total=False):
    kind: ScheduleKind
    at: str
    weekday: str | None
    timezone: str
    keep: int
    require: Require
    enabled: bool
    catch_up: int | None
    next_run_at: str | None
    next_start_at: str | None
    failures_in_row: int
    goes_next: list[GoingImage]


class Run(TypedDict, total=False):
    slot: str
    first_slot: str | None
    start_at: str | None
    state: Literal["scheduled", "running", "succeeded", "failed", "skipped"]
    image: str | None
    reason: str | None
    lateness_s: float | None


class Runs(TypedDict, total=False):
    upcoming: list[Run]
    items: list[Run]
    next: str | None


class OperationError(TypedDict, total=False):
    code: str
    message: str


class Operation(TypedDict, total=False):
    id: str
    kind: str
    server: str | None
    host: str | None
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    phase: str | None
    progress: float | None
    bytes_done: int | None
    bytes_total: int | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    requested_by: str | None
    attempt: int
    waiting: str | None
    error: OperationError | None
    result: dict[str, Any] | None
    undo_until: str | None


# CloudEvents 1.0: attribute names are the specification's, `data` is the event's own.
Event = dict[str, Any]
