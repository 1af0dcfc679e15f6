"""What `bench.load` drives: the composed deployment, whose workers have `bench.faked_disks`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embedded.stack import SERVICES
from lab.composed import Deployment, deployed
from lab.containers import engine

SERVERS = 100
KIB = 1024
PROCESSES = ("api", "beat", "redis", "postgres", *SERVICES)


@dataclass
class Target:
    """`executions` is the file that the workers write, `memory` tells bytes by container."""

    url: str
    token: str
    executions: Path
    memory: Callable[[], dict[str, int]]


@contextlib.contextmanager
def composed_stack() -> Iterator[Target]:
    """The deployment as users get it, but for the disks, with a made-up host of 100 domains."""
    with engine() as found, tempfile.TemporaryDirectory(prefix="triptych-bench-") as directory:
        state = Path(directory)
        inventory = state / "inventory.xml"
        inventory.write_text(made_up_host(SERVERS))
        deployment = Deployment(
            found,
            state,
            "triptych-bench",
            profiles=(),
            files=("docker-compose.yml", "bench/composed.yml"),
            settings={"BENCH_INVENTORY": str(inventory), "TRIPTYCH_TICK": "30"},
        )
        with deployed(deployment):
            vault = Path(deployment.environment["TRIPTYCH_VAULT"])
            yield Target(
                deployment.url,
                deployment.token,
                vault / "executions",
                lambda: {name: _memory(deployment, name) for name in PROCESSES},
            )


def made_up_host(domains: int) -> str:
    """A node for libvirt's test driver, which holds no more than what it is told."""
    return (
        "<node>"
        + "".join(
            f"<domain type='test'><name>server-{n:03}</name><memory>1048576</memory>"
            "<os><type>hvm</type></os><devices><disk type='file' device='disk'>"
            f"<source file='/nowhere/server-{n:03}.qcow2'/><target dev='vda'/></disk></devices>"
            "</domain>"
            for n in range(domains)
        )
        + "</node>"
    )


def _memory(deployment: Deployment, service: str) -> int:
    """Bytes of a container's processes; pages they share are counted in equal parts (Pss)."""
    first = int(deployment.inspect(service)["State"]["Pid"])
    return sum(_proportional(pid) for pid in _family(first))


def _family(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for each in threads for child in (each / "children").read_text().split()]
    return [pid, *(each for child in children for each in _family(child))]


def _proportional(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("Pss:"))
