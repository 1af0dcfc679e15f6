"""What can go wrong with files, as errors a user can act on."""

from shared.errors import TriptychError


class DiskError(TriptychError):
    """Something went wrong with a disk's file"""

    code = "copy_failed"
    status = 500


class CopyFailed(DiskError):
    """A disk could not be copied"""

    code = "copy_failed"
    status = 500


class ServerChanged(DiskError):
    """The server was changed by somebody else meanwhile"""

    code = "server_changed"
    status = 409


class ReflinkRefused(DiskError):
    """The file system does not share these files' extents"""

    code = "reflink_refused"
    status = 500


class PauseTooLong(DiskError):
    """The guest would be paused for longer than is allowed"""

    code = "pause_too_long"
    status = 409

    @classmethod
    def expected(cls, pause_ms: float, budget_ms: float) -> "PauseTooLong":
        return cls(
            "the disks are so fragmented, or written so much, that the guest would pause for "
            f"{pause_ms:.0f} ms, more than the {budget_ms:.0f} ms that are allowed"
        )


class ImageDamaged(DiskError):
    """A disk image is damaged"""

    code = "image_damaged"
    status = 409


class InsufficientSpace(DiskError):
    """There is not enough free space"""

    code = "insufficient_space"
    status = 507


class SetAsideConflict(DiskError):
    """A disk's files are not where this operation left them"""

    code = "set_aside_conflict"
    status = 409
