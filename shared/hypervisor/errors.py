"""What can go wrong between Triptych and libvirt, as errors a user can act on.

Free of libvirt itself: `connection.py` translates libvirt's own errors into these.
"""

from shared.errors import TriptychError


class HypervisorError(TriptychError):
    """Something went wrong at the hypervisor"""

    code = "libvirt_failed"
    status = 502


class LibvirtUnavailable(HypervisorError):
    """libvirt does not answer"""

    code = "libvirt_unavailable"
    status = 503


class LibvirtFailed(HypervisorError):
    """libvirt refused or failed"""

    code = "libvirt_failed"
    status = 502


class LibvirtBusy(HypervisorError):
    """libvirt is busy with this domain; try again"""

    code = "libvirt_busy"
    status = 503


class DomainMissing(HypervisorError):
    """The domain is not known to libvirt"""

    code = "domain_missing"
    status = 404


class DefinitionInvalid(HypervisorError):
    """The domain's definition cannot be used"""

    code = "definition_invalid"
    status = 422


class DiskNotCopyable(HypervisorError):
    """A writable disk of the domain cannot be copied"""

    code = "disk_not_copyable"
    status = 422


class DiskLost(HypervisorError):
    """The running guest's disk is not the file of its name any more"""

    code = "disk_lost"
    status = 409


class DiskInUse(HypervisorError):
    """A disk of the server is in use by somebody else"""

    code = "disk_in_use"
    status = 409


class WatchdogUnavailable(HypervisorError):
    """The helper that would resume the guest cannot be started"""

    code = "watchdog_unavailable"
    status = 503


class PauseFailed(HypervisorError):
    """The guest could not be paused and resumed as it must be"""

    code = "pause_failed"
    status = 502


class ServerNotRunning(HypervisorError):
    """The server is off"""

    code = "server_not_running"
    status = 409


class MemoryNeedsReflink(HypervisorError):
    """Memory is kept only with disks that share their extents with the vault"""

    code = "memory_needs_reflink"
    status = 409


class MemoryNotSaved(HypervisorError):
    """The guest's memory could not be saved"""

    code = "memory_not_saved"
    status = 502


class MemoryNotUsable(HypervisorError):
    """The guest cannot be resumed from the saved memory"""

    code = "memory_not_usable"
    status = 409


class MemoryNotCloneable(HypervisorError):
    """The server cannot be cloned with its memory"""

    code = "memory_not_cloneable"
    status = 409


class QuiesceFailed(HypervisorError):
    """The guest's file systems could not be frozen"""

    code = "quiesce_failed"
    status = 409


class GuestNotAnswering(HypervisorError):
    """The guest's agent does not answer"""

    code = "guest_not_answering"
    status = 504


class BackupFailed(HypervisorError):
    """The copy of the running guest failed"""

    code = "copy_failed"
    status = 500
