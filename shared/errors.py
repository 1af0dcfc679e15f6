"""The root of every error a user can meet.

Each subclass has a stable `code`, the HTTP `status` it is answered with and a
detail of one or two sentences: what happened, what was left as it was, what to
do. The class docstring is the problem's title.
"""

from typing import Any


class TriptychError(Exception):
    """Something went wrong inside Triptych"""

    code = "internal_error"
    status = 500

    def __init__(self, detail: str, **extra: Any) -> None:
        """`extra` becomes members of the RFC 9457 problem, e.g. `conflict`."""
        super().__init__(detail)
        self.detail = detail
        self.extra = extra

    @property
    def title(self) -> str:
        return (type(self).__doc__ or self.code).strip().splitlines()[0]


class NotFound(TriptychError):
    """There is no such thing"""

    code = "not_found"
    status = 404


class Unauthorized(TriptychError):
    """No valid token came with the request"""

    code = "unauthorized"
    status = 401


class InvalidRequest(TriptychError):
    """The request cannot be understood"""

    code = "invalid_request"
    status = 422


class Conflict(TriptychError):
    """The request clashes with how things stand"""

    code = "conflict"
    status = 409


class ServerNotFound(NotFound):
    """No server of that id or name is registered"""

    code = "server_not_found"


class HostNotFound(NotFound):
    """No host of that name has reported"""

    code = "host_not_found"


class DomainNotFound(NotFound):
    """The host has no libvirt domain of that name"""

    code = "domain_not_found"


class SnapshotNotFound(NotFound):
    """The server has no snapshot"""

    code = "snapshot_not_found"


class SnapshotWithoutMemory(Conflict):
    """The snapshot holds disks alone"""

    code = "snapshot_without_memory"


class ImageNotFound(NotFound):
    """There is no image of that id or name"""

    code = "image_not_found"


class CloneNotFound(NotFound):
    """There is no clone of that id or name"""

    code = "clone_not_found"


class FarmNotFound(NotFound):
    """There is no farm of that id or name"""

    code = "farm_not_found"


class ScheduleNotFound(NotFound):
    """The server has no such schedule"""

    code = "schedule_not_found"


class OperationNotFound(NotFound):
    """There is no operation of that id"""

    code = "operation_not_found"


class AmbiguousName(Conflict):
    """More than one thing has that name"""

    code = "ambiguous_name"


class SnapshotExists(Conflict):
    """The server has a snapshot already"""

    code = "snapshot_exists"


class ServerExists(Conflict):
    """The domain is registered already"""

    code = "server_exists"


class CloneNameTaken(Conflict):
    """The clone's name is taken"""

    code = "clone_name_taken"


class ImageNameTaken(Conflict):
    """The server has an image of that name"""

    code = "image_name_taken"


class HostDraining(Conflict):
    """The host takes no new work"""

    code = "host_draining"


class ServerBusy(Conflict):
    """Work on the server is under way"""

    code = "server_busy"


class ImageNotUsable(Conflict):
    """The image is not whole"""

    code = "image_not_usable"


class FarmSourceGone(Conflict):
    """What the farm was made from is gone"""

    code = "farm_source_gone"


class NothingToRetry(Conflict):
    """No clone of the farm has failed"""

    code = "nothing_to_retry"


class GuestStillOn(Conflict):
    """The guest did not shut down in time"""

    code = "guest_still_on"


class IdempotencyKeyReused(Conflict):
    """The Idempotency-Key was used for another request"""

    code = "idempotency_key_reused"


class NotCancellable(Conflict):
    """The operation can no longer be cancelled"""

    code = "not_cancellable"


class NotUndoable(Conflict):
    """The operation cannot be undone"""

    code = "not_undoable"


class Unsupported(InvalidRequest):
    """This Triptych cannot do that"""

    code = "unsupported"


class DomainWithoutDisks(InvalidRequest):
    """The domain has no disk that could be copied"""

    code = "domain_without_disks"


class IdentityNotRenewed(TriptychError):
    """The clone's identity could not be renewed in the way that was asked for"""

    code = "identity_not_renewed"
    status = 502


class HostNotAnswering(TriptychError):
    """The host's workers do not answer"""

    code = "host_not_answering"
    status = 503


class VaultNotMounted(TriptychError):
    """What is in the vault's place is not the host's vault"""

    code = "vault_not_mounted"
    status = 503


class Cancelled(TriptychError):
    """The operation was cancelled"""

    code = "cancelled"
    status = 409


class SlotMissed(TriptychError):
    """No worker could begin a schedule's run in time"""

    code = "slot_missed"
    status = 409


class LeaseLost(TriptychError):
    """Another worker took the operation over"""

    code = "lease_lost"
    status = 409


class DatabaseRestored(TriptychError):
    """The database was restored from a backup made before the operation had ended"""

    code = "database_restored"
    status = 409
