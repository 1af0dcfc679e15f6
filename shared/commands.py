"""What can be asked for: one typed message per kind of operation.

The same command comes from the API, from beat, or from anyone by a Celery message.
`kind` names the operation, `service` the queue that it goes to, `task` the Celery task.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SERVICES = {"snapshotter": "snapshots", "imager": "images", "cloner": "clones"}
"""Which queue each service reads: `<queue>.<host>`."""


def _name(value: str) -> str:
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            "a name has 1 to 63 letters, digits, dots, dashes or underscores "
            "and begins with a letter or digit"
        )
    return value


def _name_pattern(value: str) -> str:
    """`qa-{n:03}`: a Python format with the one field `n`, that gives valid names."""
    if not re.fullmatch(r"[^{}]*(\{n(:0?[1-9][0-9]?)?\}[^{}]*)?", value):
        raise ValueError("the only place-holder is {n} or {n:03}")
    _name(value.format(n=1))
    return value


Name = Annotated[str, AfterValidator(_name)]
NamePattern = Annotated[str, Field(max_length=80), AfterValidator(_name_pattern)]
Reference = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")]
Quiesce = Literal["auto", "require", "never"]
IdentityWay = Literal["auto", "agent", "cloud-init", "offline", "keep"]
Description = Annotated[str, Field(max_length=1000)]
Lifetime = Annotated[float, Field(gt=0, le=24 * 366, allow_inf_nan=False, description="hours")]


class Command(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: ClassVar[str]
    service: ClassVar[str]
    task: ClassVar[str]


class TakeSnapshot(Command):
    kind, service, task = "snapshot.take", "snapshotter", "snapshotter.take"

    server: Reference
    replace: bool = False
    with_memory: bool = False
    quiesce: Quiesce = "auto"
    description: Description = ""


class RevertSnapshot(Command):
    kind, service, task = "snapshot.revert", "snapshotter", "snapshotter.revert"

    server: Reference
    with_memory: bool = True
    """Resume the memory where the snapshot holds it, instead of booting from the disks."""
    snapshot: Reference | None = None
    """Only this one; filled in at admission, so that a later snapshot is not meant."""


class DeleteSnapshot(Command):
    kind, service, task = "snapshot.delete", "snapshotter", "snapshotter.delete"

    server: Reference
    snapshot: Reference | None = None
    """As of RevertSnapshot."""
    expired: bool = False


class PromoteSnapshot(Command):
    """The imager's work: what it makes is an image."""

    kind, service, task = "snapshot.promote", "imager", "imager.promote"

    server: Reference
    snapshot: Reference | None = None
    """As of RevertSnapshot."""
    name: Name | None = None
    description: Description = ""
    pinned: bool = False


class CreateImage(Command):
    kind, service, task = "image.create", "imager", "imager.create"

    server: Reference
    name: Name | None = None
    description: Description = ""
    pinned: bool = False
    quiesce: Quiesce = "auto"


class RestoreImage(Command):
    kind, service, task = "image.restore", "imager", "imager.restore"

    image: Reference


class DeleteImage(Command):
    kind, service, task = "image.delete", "imager", "imager.delete"

    image: Reference


class VerifyImage(Command):
    kind, service, task = "image.verify", "imager", "imager.verify"

    image: Reference
    boot: bool = False


class CloneSource(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["server", "snapshot", "image"]
    id: Reference
    """A server's (for `server` and `snapshot`) or an image's id or name."""
    snapshot: Reference | None = None
    """As of RevertSnapshot."""


class CreateClones(Command):
    kind, service, task = "clone.create", "cloner", "cloner.clone"

    source: CloneSource
    name: NamePattern
    count: int = Field(1, ge=1, le=100)
    first: int = Field(1, ge=0, le=99999)
    """The number of the first; more of a farm there is are made from where that ends."""
    vcpus: int | None = Field(None, ge=1, le=512)
    memory_mib: int | None = Field(None, ge=64, le=16 * 1024 * 1024)
    with_memory: bool = False
    linked: bool = False
    """Where disks cannot share extents: overlays on one copy, instead of a copy for each."""
    start: bool = True
    identity: IdentityWay = "auto"
    quiesce: Quiesce = "auto"
    expires_in_h: Lifetime | None = None
    """Deleted so many hours after it was made; None: it lives until it is deleted."""

    @model_validator(mode="after")
    def _each_has_its_own_name(self) -> "CreateClones":
        if self.count > 1 and "{n" not in self.name:
            raise ValueError("more than one clone needs {n} in the name, e.g. qa-{n:03}")
        if self.first != 1 and "{n" not in self.name:
            raise ValueError("`first` is the number that goes into {n}, which the name has not")
        for name in self.names:
            _name(name)
        return self

    @property
    def names(self) -> list[str]:
        return [self.name.format(n=n) for n in range(self.first, self.first + self.count)]


class DeleteClone(Command):
    kind, service, task = "clone.delete", "cloner", "cloner.delete_clone"

    clone: Reference


class StartFarm(Command):
    kind, service, task = "farm.start", "cloner", "cloner.start"

    farm: Reference


class StopFarm(Command):
    kind, service, task = "farm.stop", "cloner", "cloner.stop"

    farm: Reference
    timeout_s: int = Field(120, ge=1, le=3600)
    """How long the guests are given to shut down, once all have been asked."""
    force: bool = False
    """Force off those that are still on then."""


class RetryFarm(Command):
    """Makes the clones that failed once more, from the farm's source as it is now."""

    kind, service, task = "farm.retry", "cloner", "cloner.retry"

    farm: Reference


class DeleteFarm(Command):
    kind, service, task = "farm.delete", "cloner", "cloner.delete"

    farm: Reference
    expired: bool = False
    """Only if its time is over by then: it may have been given more."""


class UndoRevert(Command):
    kind, service, task = "snapshot.revert.undo", "snapshotter", "snapshotter.undo"

    operation: Reference


class UndoRestore(Command):
    kind, service, task = "image.restore.undo", "imager", "imager.undo"

    operation: Reference


class ForgetRevert(Command):
    """Drops what a revert set aside, when the time to undo it is over."""

    kind, service, task = "snapshot.revert.forget", "snapshotter", "snapshotter.forget"

    operation: Reference


class ForgetRestore(Command):
    kind, service, task = "image.restore.forget", "imager", "imager.forget"

    operation: Reference


def _all_commands(base: type[Command]) -> list[type[Command]]:
    return [each for sub in base.__subclasses__() for each in (sub, *_all_commands(sub))]


BY_KIND: dict[str, type[Command]] = {each.kind: each for each in _all_commands(Command)}


def queue_of(service: str, host: str) -> str:
    return f"{SERVICES[service]}.{host}"


def parse(kind: str, document: dict[str, Any]) -> Command:
    return BY_KIND[kind].model_validate(document)
