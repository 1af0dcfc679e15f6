"""What a running guest may have and still be cloned with its memory."""

from __future__ import annotations

import pytest

from shared.hypervisor.errors import MemoryNotCloneable
from shared.hypervisor.hot import refuse_hot

MIB = 2**20
DISK = (
    "<disk type='file' device='disk'><driver type='qcow2'/><source file='/a'/>"
    "<target dev='vda' bus='virtio'/>{}</disk>"
)


def domain(devices: str = "", more: str = "") -> str:
    return (
        "<domain type='kvm'><name>web1</name><memory unit='MiB'>256</memory><vcpu>2</vcpu>"
        f"{more}<devices>{DISK.format('')}{devices}</devices></domain>"
    )


@pytest.mark.parametrize(
    "devices",
    [
        "<interface type='bridge'><mac address='52:54:00:00:00:01'/></interface>",
        "<disk type='file' device='cdrom'><target dev='sda'/></disk>",
        "<disk type='network' device='cdrom'><target dev='sda'/></disk>",
        "<serial type='tcp'><source host='127.0.0.1' service='1'/></serial>",
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
        "<graphics type='vnc' port='5901'/><video/><memballoon model='virtio'/>",
    ],
)
def test_what_a_clone_has_of_its_own_is_no_obstacle(devices: str) -> None:
    """Network cards, empty drives, lines, channels and displays."""
    assert refuse_hot(domain(devices), vcpus=2, memory_bytes=256 * MIB) is None


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ("<hostdev mode='subsystem' type='pci'/>", "host device"),
        ("<interface type='hostdev'/>", "host device"),
        ("<interface type='vhostuser'/>", "switch port"),
        ("<input type='evdev'/>", "input device"),
        ("<tpm><backend type='emulator'/></tpm>", "virtual TPM"),
        ("<tpm><backend type='passthrough'/></tpm>", "virtual TPM"),
        ("<filesystem type='mount'/>", "directory"),
        ("<shmem name='x'/>", "shares memory"),
        ("<interface type='vdpa'/>", "host device"),
        ("<tpm><backend type='external'/></tpm>", "virtual TPM"),
        ("<pstore backend='acpi-erst'/>", "pstore"),
        ("<channel type='tcp'><source host='h' service='1'/></channel>", "far end"),
        (
            "<disk device='cdrom'><source file='/iso'/><target dev='sda'/></disk>",
            "sda holds a medium",
        ),
        (
            "<disk type='network' device='cdrom'><source protocol='https' name='/iso'/>"
            "<target dev='sda'/></disk>",
            "sda holds a medium",
        ),
        (
            "<disk type='volume' device='cdrom'><source pool='isos' volume='a.iso'/>"
            "<target dev='sda'/></disk>",
            "sda holds a medium",
        ),
        (DISK.format("<shareable/>").replace("vda", "vdb"), "vdb: .*shared"),
        (DISK.format("<readonly/>").replace("vda", "vdb"), "vdb: .*shared"),
    ],
)
def test_what_belongs_to_one_guest_is_refused(devices: str, reason: str) -> None:
    """The stream of the memory has it, and a clone could not."""
    with pytest.raises(MemoryNotCloneable, match=reason) as refusal:
        refuse_hot(domain(devices))
    assert (refusal.value.code, refusal.value.status) == ("memory_not_cloneable", 409)


def test_encrypted_memory_is_refused() -> None:
    """It can be read by the one guest alone."""
    with pytest.raises(MemoryNotCloneable, match="encrypted"):
        refuse_hot(domain(more="<launchSecurity type='sev'/>"))


def test_every_reason_is_told_at_once() -> None:
    """So that it is asked once more, not once for each."""
    with pytest.raises(MemoryNotCloneable) as refusal:
        refuse_hot(domain("<shmem name='x'/><filesystem type='mount'/>"), vcpus=3)
    for part in ("shares memory", "directory", "2 vCPUs and 256 MiB"):
        assert part in refusal.value.detail


@pytest.mark.parametrize(("vcpus", "memory"), [(1, None), (None, 512 * MIB)])
def test_another_size_is_refused(vcpus: int | None, memory: int | None) -> None:
    """The memory is that of a guest of one size."""
    with pytest.raises(MemoryNotCloneable, match="another size"):
        refuse_hot(domain(), vcpus=vcpus, memory_bytes=memory)
