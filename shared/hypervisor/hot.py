"""What of a running guest cannot be in two guests at once, so that its memory is not cloned.

Owns: the one list of such things. What is in the stream of the memory must be there when it is
loaded, so nothing that a clone goes without can be left out here.
"""

import contextlib
from collections.abc import Iterator

import libvirt
from lxml import etree

from shared.hypervisor import commandline
from shared.hypervisor.connection import connect
from shared.hypervisor.definition import DomainDefinition, parse_domain, to_text
from shared.hypervisor.duplicate import PSEUDO_TERMINAL, clone_definition
from shared.hypervisor.errors import MemoryNotCloneable

_ONE_GUESTS = (
    ("devices/tpm", "its virtual TPM belongs to one guest"),
    ("devices/filesystem", "it has files of a directory of the host's open"),
    ("devices/pstore", "its pstore belongs to one guest"),
    ("launchSecurity", "its memory is encrypted for this one guest"),
)
_ANY_UUID = "00000000-0000-4000-8000-000000000000"


def refuse_hot(xml: str, *, vcpus: int | None = None, memory_bytes: int | None = None) -> None:
    """Raise MemoryNotCloneable, naming every reason, where the running domain `xml` cannot be
    cloned with its memory; `vcpus` and `memory_bytes` are what the clone is asked to have.

    Raises DefinitionInvalid and Unsupported for what cannot be cloned at all.
    """
    domain = DomainDefinition.parse(xml)
    reasons = _obstacles(domain, parse_domain(xml))
    if vcpus not in (None, domain.vcpus) or memory_bytes not in (None, domain.memory_bytes):
        reasons.append(
            f"its memory is that of a guest with {domain.vcpus} vCPUs and "
            f"{domain.memory_bytes // 2**20} MiB, and another size was asked for"
        )
    if reasons:
        raise MemoryNotCloneable(
            f"{domain.name} cannot be cloned with its memory: {'; '.join(reasons)}. Nothing was "
            "copied; change that, or clone it without memory."
        )


def refuse_elsewhere(uri: str, xml: str) -> None:
    """Raise MemoryNotCloneable where the domain `xml`, which ran once, could not go on here: QEMU
    has its machine type no more, or the host not the CPU. What libvirt cannot tell, as of a CPU
    without a model, it finds when it resumes the memory; one with `check='none'`, which is also
    that of a domain that names none, it never compares, and QEMU drops what the host has not.
    """
    root = parse_domain(xml)
    system, cpu = root.find("os/type"), root.find("cpu")
    if system is None:
        return
    emulator, arch = root.findtext("devices/emulator"), system.get("arch")
    given = emulator, arch, system.get("machine"), root.get("type")
    connection, flag = connect(uri), libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
    with _refused(root, libvirt.VIR_ERR_INVALID_ARG):
        connection.getDomainCapabilities(*given)
    if cpu is not None and cpu.get("check") != "none" and cpu.find("model") is not None:
        with _refused(root, libvirt.VIR_ERR_CPU_INCOMPATIBLE):
            connection.compareHypervisorCPU(*given, to_text(cpu), flag)


@contextlib.contextmanager
def _refused(root: etree._Element, code: int) -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() == code:
            raise MemoryNotCloneable(
                f"{root.findtext('name')} cannot go on with its memory on this host as it is now: "
                f"{error}. Nothing was copied; clone it without memory."
            ) from error


def _obstacles(domain: DomainDefinition, root: etree._Element) -> list[str]:
    drives = (disk for disk in domain.disks if disk.device in ("cdrom", "floppy"))
    media = [disk for disk in drives if disk.has_source]
    disks = {disk.target: "/" for disk in domain.disks if not disk.left_out_because}
    clone = clone_definition(domain.xml, name="clone", uuid=_ANY_UUID, disk_paths=disks)
    return [
        *(reason for path, reason in _ONE_GUESTS if root.find(path) is not None),
        *(["it has a network card on QEMU's command line"] * commandline.has_network_card(root)),
        *(f"{disk.target} holds a medium, which is not copied (eject it)" for disk in media),
        *(
            f"{each.target}: {each.reason}"
            for each in clone.left_out
            if each.reason != PSEUDO_TERMINAL and not each.target.startswith("tpm")
        ),
    ]
