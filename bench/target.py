"""What `bench.load` drives: a running stack whose workers have `bench.faked_disks` for disks."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embedded.stack import SERVICES, Stack, free_port
from lab.postgres import postgres

SERVERS = 100
KIB = 1024


@dataclass
class Target:
    """`executions` is the file that the workers write, `memory` tells bytes by process."""

    url: str
    token: str
    executions: Path
    memory: Callable[[], dict[str, int]]


@contextlib.contextmanager
def embedded_stack() -> Iterator[Target]:
    """The processes of `make up`, with PostgreSQL, and a made-up host of 100 domains."""
    with (
        postgres(durable=True) as cluster,
        tempfile.TemporaryDirectory(prefix="triptych-bench-") as directory,
    ):
        state = Path(directory)
        inventory = state / "inventory.xml"
        inventory.write_text(made_up_host(SERVERS))
        stack = Stack(
            state,
            port=free_port(),
            settings={
                "TRIPTYCH_DATABASE_URL": cluster.create("load"),
                "TRIPTYCH_LIBVIRT_URI": f"test://{inventory}",
            },
            worker_app="bench.faked_disks:{service}",
        )
        try:
            stack.start()
            yield Target(
                stack.url,
                stack.token,
                Path(stack.environment["TRIPTYCH_VAULT"]) / "executions",
                lambda: memory_of(stack),
            )
        finally:
            stack.stop()


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


def memory_of(stack: Stack) -> dict[str, int]:
    """Bytes by process, a worker with its children; shared pages in equal parts (Pss)."""
    return {
        name: sum(_proportional(pid) for pid in _family(stack.pid(name)))
        for name in ("api", "beat", "redis", *SERVICES)
    }


def _family(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for each in threads for child in (each / "children").read_text().split()]
    return [pid, *(each for child in children for each in _family(child))]


def _proportional(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("Pss:"))
