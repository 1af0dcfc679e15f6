"""What the API answers with. Fields may be added; those here stay.

Times are RFC 3339 in UTC, sizes are bytes, ids are opaque. Words such as states are not
validated on the way out: a worker newer than this API may use one more.
"""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field

from shared import models


def _one_of(*words: str) -> Any:
    return Field(json_schema_extra={"enum": list(words)})


Kind = Annotated[str, _one_of("daily", "weekly")]
Way = Annotated[str, _one_of("reflink", "overlay", "stream")]
Consistency = Annotated[str, _one_of("application", "file-system", "crash")]
PauseMs = Annotated[
    float | None, Field(description="how long the guest stood still; 0: it was off, or streamed")
]
UNIQUE = Field(None, description="what deleting it would free; null: not measured yet")
ServerId = Annotated[str, Field(description="the server's id")]


class Load(BaseModel):
    """What a host has to do; a drain is over when both are 0."""

    queued: int = 0
    running: int = 0


class VaultUsage(BaseModel):
    """What the copies in a host's vault take up, in bytes; measured by turns, in the background.

    What is not measured yet counts in `copies` and `apparent_bytes` alone.
    """

    copies: int = Field(0, description="snapshots and images")
    measured: int = Field(0, description="how many of them were measured")
    apparent_bytes: int = Field(0, description="what they would take up if they shared nothing")
    unique_bytes: int = Field(0, description="what each alone would free, added up")
    shared_bytes: int = Field(0, description="the rest, counted for each copy that has it")
    measured_at: datetime | None = Field(None, description="the longest ago of the measurements")


class Host(BaseModel):
    """A libvirt host and what it can do; null where the host has not said."""

    name: str
    answering: bool = Field(description="not silent and without a problem")
    silent: bool = Field(description="not seen for 90 s: what is queued there waits")
    draining: bool = Field(description="takes no new work, until it is resumed")
    operations: Load
    last_seen_at: datetime | None
    problem: str | None = Field(description="why the inventory is not current")
    libvirt: Any = Field(None, description="version")
    qemu: Any = Field(None, description="version")
    vault: Any = Field(None, description="the vault's directory")
    vault_usage: VaultUsage
    reflink: Any = Field(None, description="whether the vault's file system shares extents")
    quiesce: Any = Field(None, description="whether guests can be asked to freeze")
    memory: Any = Field(False, description="whether copies can hold RAM")
    free_bytes: int | None = None
    total_bytes: int | None = None


class Disk(BaseModel):
    target: str
    format: str | None = None
    path: str | None = None
    capacity_bytes: int | None = None
    writable: bool = True


class Domain(BaseModel):
    """A libvirt domain of a host, registered or not."""

    name: str
    uuid: str
    state: Annotated[str, _one_of("running", "stopped", "paused")]
    vcpus: int
    memory_bytes: int
    disks: list[Disk]
    server: str | None = Field(description="the server's id where the domain is registered")

    @classmethod
    def of(cls, row: models.Domain, server: str | None) -> "Domain":
        return cls(**row.model_dump(exclude={"host"}), server=server)


class Server(BaseModel):
    id: str
    name: str
    host: str
    domain: str = Field(description="the libvirt domain's name now")
    uuid: str
    state: Annotated[str, _one_of("running", "stopped", "paused", "missing")]
    vcpus: int | None
    memory_bytes: int | None
    disks: list[Disk]
    snapshot: str | None = Field(description="the snapshot's id")
    newest_image: str | None = Field(description="the id of the newest whole image")

    @classmethod
    def of(
        cls,
        row: models.Server,
        domain: models.Domain | None,
        snapshot: str | None,
        newest_image: str | None,
    ) -> "Server":
        return cls(
            id=row.id,
            name=row.name,
            host=row.host,
            domain=domain.name if domain else row.name,
            uuid=row.domain_uuid,
            state=domain.state if domain else "missing",
            vcpus=domain.vcpus if domain else None,
            memory_bytes=domain.memory_bytes if domain else None,
            disks=[Disk.model_validate(each) for each in domain.disks] if domain else [],
            snapshot=snapshot,
            newest_image=newest_image,
        )


class Forgotten(BaseModel):
    """What became of a server that is no longer registered. Its VM and its images stay."""

    id: str
    name: str
    forgotten_at: datetime
    images_kept: int = Field(description="`GET /v1/servers/{id}/images` lists them, by this id")
    images_kept_bytes: int
    schedules_ended: list[Kind]


class Snapshot(BaseModel):
    id: str
    server: ServerId
    taken_at: datetime
    expires_at: datetime
    with_memory: bool
    consistency: Consistency
    way: Way
    pause_ms: PauseMs
    bytes: int
    unique_bytes: int | None = UNIQUE
    description: str

    @classmethod
    def of(cls, row: models.Snapshot) -> "Snapshot":
        return cls(**row.model_dump(), server=row.server_id)


class Verified(BaseModel):
    at: datetime | None
    result: str | None


class Proof(BaseModel):
    """The boot proof (I8)."""

    at: datetime | None = None
    result: Annotated[str, _one_of("proven", "failed", "not_run")] = "not_run"
    reason: str | None = "boot proof not available in this version"


class Image(BaseModel):
    id: str
    name: str
    server: ServerId
    created_at: datetime
    description: str
    pinned: bool
    origin: Annotated[str, _one_of("manual", "daily", "weekly", "promoted")]
    state: Annotated[str, _one_of("complete", "missing", "damaged")]
    way: Way
    consistency: Consistency
    pause_ms: PauseMs
    bytes: int
    unique_bytes: int | None = UNIQUE
    verified: Verified
    proof: Proof = Field(default_factory=Proof)
    left_out: list[Any] = Field(description="disks that are not in it, and why")

    @classmethod
    def of(cls, row: models.Image) -> "Image":
        verified = Verified(at=row.verified_at, result=row.verified_result)
        return cls(**row.model_dump(), server=row.server_id, verified=verified)


class CloneOrigin(BaseModel):
    kind: Annotated[str, _one_of("server", "snapshot", "image")]
    id: str = Field(description="of the image, or of the server that it or whose snapshot it was")


class Identity(BaseModel):
    """What of the guest's identity was renewed, and what is its source's still."""

    way: Annotated[str | None, _one_of("agent", "cloud-init", "offline", "keep")] = None
    hostname: str | None = Field(None, description="the clone's name, as far as it can be one")
    renewed: list[Any] = []
    pending: list[Any] = Field([], description="what is still to be renewed, and when")
    kept: list[Any] = Field([], description="what is its source's still, and why")
    left_out: list[Any] = Field([], description="what of its source it goes without, and why")


class Clone(BaseModel):
    id: str
    name: str
    host: str
    server: str | None = Field(description="the new server's id, once it is defined")
    source: CloneOrigin
    created_at: datetime
    with_memory: bool
    way: str | None
    linked_to: list[str] = Field(description="the files that its disks stand on, if it is linked")
    identity: Identity
    state: Annotated[str, _one_of("queued", "making", "ready", "failed", "cancelled", "deleted")]
    error: "OperationError | None"
    farm: str | None = Field(description="the id of the farm that it is one of")
    operation: str = Field(description="the id of the operation that makes or made it")

    @classmethod
    def of(cls, row: models.Clone) -> "Clone":
        return cls(
            **row.model_dump(),
            server=row.server_id,
            source=CloneOrigin(kind=row.source_kind, id=row.source_id),
            farm=row.farm_id,
            operation=row.operation_id,
        )


class Farm(BaseModel):
    """What one request for clones made: one clone or a hundred."""

    id: str
    name: str = Field(description="the pattern of its clones' names")
    host: str
    source: CloneOrigin
    created_at: datetime
    expires_in_h: float | None = Field(description="how long it lives, as it was set last")
    expires_at: datetime | None = Field(
        description="when it is deleted by itself; null: never, or it is not made yet"
    )
    clones: dict[str, int] = Field(description="how many clones are in each state")
    power: dict[str, int] = Field(description="how many of their VMs run, are stopped, …")
    operation: str = Field(description="the id of the operation that made it")

    @classmethod
    def of(cls, row: models.Farm, clones: dict[str, int], power: dict[str, int]) -> "Farm":
        return cls(
            **row.model_dump(),
            source=CloneOrigin.model_validate(row.command["source"]),
            clones=clones,
            power=power,
            operation=row.operation_id,
        )


class FarmWithClones(Farm):
    items: list[Clone] = Field(description="its clones, by name")


class GoingImage(BaseModel):
    """An image that is the next to go by rotation."""

    id: str
    name: str
    created_at: datetime
    bytes: int

    @classmethod
    def of(cls, row: models.Image) -> "GoingImage":
        return cls(**row.model_dump())


class Schedule(BaseModel):
    kind: Kind
    at: str
    weekday: str | None
    timezone: str
    keep: int
    require: Annotated[str, _one_of("complete", "verified")] = Field(
        description="what an image must be to count, and for older ones to go"
    )
    enabled: bool
    catch_up: int = Field(description="seconds a missed slot may be late and still run")
    next_run_at: datetime | None
    next_start_at: datetime | None = Field(
        description="when that run starts: the slot and the server's place in the spread"
    )
    failures_in_row: int
    goes_next: list[GoingImage] = Field(
        description="images that go when the next run has succeeded, oldest first, as things are"
    )

    @classmethod
    def of(cls, row: models.Schedule, goes_next: list[models.Image]) -> "Schedule":
        going = [GoingImage.of(each) for each in goes_next]
        return cls(
            **row.model_dump(),
            catch_up=row.catch_up_s,
            next_start_at=row.start_at,
            goes_next=going,
        )


class Run(BaseModel):
    slot: datetime = Field(description="the nominal instant")
    first_slot: datetime | None = Field(
        None, description="of a skipped run that stands for all slots of a long outage the first"
    )
    start_at: datetime | None = Field(
        None, description="when it was to start: the slot and the server's place in the spread"
    )
    state: Annotated[str, _one_of("scheduled", "running", "succeeded", "failed", "skipped")]
    image: str | None = None
    reason: str | None = Field(None, description="why it failed, was skipped, or does not start")
    lateness_s: float | None = Field(None, description="from `start_at` to the work's start")

    @classmethod
    def of(
        cls, row: models.ScheduleRun, operation: models.Operation | None, waiting: str | None
    ) -> "Run":
        state, lateness = row.state, None
        if operation and operation.started_at:
            planned = row.start_at or row.slot
            lateness = round((operation.started_at - planned).total_seconds(), 3)
        if operation and operation.state in ("queued", "running"):
            state = "scheduled" if operation.state == "queued" else "running"
        return cls(
            slot=row.slot,
            first_slot=row.first_slot,
            start_at=row.start_at,
            state=state,
            image=row.image_id,
            reason=row.reason or waiting,
            lateness_s=lateness,
        )


class Runs(BaseModel):
    upcoming: list[Run] = Field(description="the next ten, soonest first; none when disabled")
    items: list[Run] = Field(description="the last fifty, newest first")


class OperationError(BaseModel):
    code: str
    message: str


class Operation(BaseModel):
    """One piece of long work. It ends as succeeded, failed or cancelled."""

    id: str
    kind: str
    server: ServerId
    host: str
    state: Annotated[str, _one_of("queued", "running", "succeeded", "failed", "cancelled")]
    phase: str
    progress: int = Field(ge=0, le=100, description="percent")
    bytes_done: int
    bytes_total: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    requested_by: str
    attempt: int
    waiting: str | None = Field(description="why it does not start or go on, where that is known")
    error: OperationError | None
    result: dict[str, Any] | None = Field(
        description="what was made: `{snapshot}`, `{image}` or `{clones: […]}`"
    )
    undo_until: datetime | None = Field(description="until when `POST …/undo` puts back")

    @classmethod
    def of(cls, row: models.Operation, waiting: str | None) -> "Operation":
        shown = row.model_dump(exclude={"undo_until"})
        undo_until = row.undo_until if row.undo else None
        return cls(**shown, server=row.server_id, undo_until=undo_until, waiting=waiting)


class Event(BaseModel):
    """CloudEvents 1.0; `subject` is a server's id."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str | None
    time: datetime
    datacontenttype: str
    data: dict[str, Any]


class Check(BaseModel):
    status: Annotated[str, _one_of("ok", "degraded", "failed")]
    reason: str | None = None


class Health(BaseModel):
    status: Annotated[str, _one_of("ok", "degraded", "failed")]
    checks: dict[str, Check] = {}


class ProblemKind(BaseModel):
    """What a problem's `code` means."""

    type: str
    code: str
    title: str
    status: int


Clone.model_rebuild()
FarmWithClones.model_rebuild()
