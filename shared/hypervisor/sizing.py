"""Changing a definition's vCPUs and memory so that it still adds up.

libvirt refuses a definition whose topology, NUMA cells or pins disagree with
its totals; this keeps them in step. Pure lxml.
"""

from lxml import etree

from shared.hypervisor.definition import memory_of, to_bytes
from shared.hypervisor.errors import DefinitionInvalid

KIB = 1024


def set_memory(root: etree._Element, memory_bytes: int) -> None:
    """Give the guest `memory_bytes` of memory, NUMA cells in their old proportions.

    Raises DefinitionInvalid where it has plugged memory modules, whose sizes are
    part of the total.
    """
    before = memory_of(root)
    if memory_bytes == before:
        return
    if root.find("devices/memory") is not None:
        raise DefinitionInvalid(
            "The server has memory modules (DIMMs) beside its base memory; "
            "clone it with the memory size it has."
        )
    kib = memory_bytes // KIB
    if kib < 1:
        raise DefinitionInvalid(f"{memory_bytes} bytes are too little memory for a guest.")
    for tag in ("memory", "currentMemory"):
        node = root.find(tag)
        if node is None and tag == "memory":
            node = etree.SubElement(root, tag)
        if node is not None:
            node.set("unit", "KiB")
            node.text = str(kib)
    ceiling = root.find("maxMemory")
    if ceiling is not None and to_bytes(ceiling) < memory_bytes:
        ceiling.set("unit", "KiB")
        ceiling.text = str(kib)
    cells = root.findall("cpu/numa/cell")
    left = kib
    for index, cell in enumerate(cells):
        last = index == len(cells) - 1
        share = left if last else kib * _cell_bytes(cell) // max(before, 1)
        cell.set("unit", "KiB")
        cell.set("memory", str(share))
        left -= share


def set_vcpus(root: etree._Element, count: int) -> None:
    """Give the guest `count` vCPUs: topology, NUMA cells and pins follow."""
    if count < 1:
        raise DefinitionInvalid("A guest needs at least one vCPU.")
    node = root.find("vcpu")
    if node is None:
        node = etree.SubElement(root, "vcpu")
    if (node.text or "").strip() == str(count) and not node.get("current"):
        return
    node.text = str(count)
    if "current" in node.attrib:
        del node.attrib["current"]
    for individual in root.findall("vcpus"):
        root.remove(individual)
    _fit_topology(root, count)
    _fit_cells(root, count)
    _fit_pins(root, count)


def _fit_pins(root: etree._Element, count: int) -> None:
    """Drop what pins or schedules vCPUs that are no more."""
    for tag, attribute in (("vcpupin", "vcpu"), ("vcpusched", "vcpus")):
        for pin in root.findall(f"cputune/{tag}"):
            vcpu = pin.get(attribute, "")
            parent = pin.getparent()
            if parent is not None and (not vcpu.isdigit() or int(vcpu) >= count):
                parent.remove(pin)


def _fit_topology(root: etree._Element, count: int) -> None:
    """Keep sockets, dies and threads and change the cores; else one socket of `count` cores."""
    topology = root.find("cpu/topology")
    if topology is None:
        return
    others = [name for name in ("sockets", "dies", "clusters", "threads") if topology.get(name)]
    per_core = 1
    for name in others:
        per_core *= int(topology.get(name, "1"))
    if count % per_core == 0:
        topology.set("cores", str(count // per_core))
        return
    for name in others:
        topology.set(name, "1")
    topology.set("cores", str(count))


def _fit_cells(root: etree._Element, count: int) -> None:
    """Spread the vCPUs over the NUMA cells, as evenly as they go."""
    cells = root.findall("cpu/numa/cell")
    if not cells:
        return
    if count < len(cells):
        raise DefinitionInvalid(
            f"The server has {len(cells)} NUMA cells and needs as many vCPUs; {count} are too few."
        )
    first = 0
    for index, cell in enumerate(cells):
        size = count // len(cells) + (1 if index < count % len(cells) else 0)
        cell.set("cpus", f"{first}-{first + size - 1}" if size > 1 else str(first))
        first += size


def _cell_bytes(cell: etree._Element) -> int:
    node = etree.Element("memory", unit=cell.get("unit", "KiB"))
    node.text = cell.get("memory", "0")
    return to_bytes(node)
