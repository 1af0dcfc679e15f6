"""Real Celery workers of pretended work, that tests start and kill."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from operations.spine import Broker, World, wait_for

from shared.commands import TakeSnapshot
from shared.models import Operation
from shared.operations import outbox
from shared.settings import settings

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("succeeded", "failed", "cancelled")


class Worker:
    """A worker of pretended work, in a process group of its own."""

    def __init__(self, vault: Path, app: str = "operations.fake_service") -> None:
        self.vault, self.app = vault, app
        self.log = vault / f"{app}.log"
        self.start()

    def start(self) -> None:
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", self.app, "worker"],
                env={**os.environ, "PYTHONPATH": path},
                cwd=self.vault,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """All of it at once, as the kernel does when memory runs out."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def did(self) -> list[str]:
        file = self.vault / "log"
        return file.read_text().splitlines() if file.exists() else []


@contextlib.contextmanager
def working(*apps: str) -> Iterator[list[Worker]]:
    workers = [Worker(settings().vault, app) for app in apps]
    try:
        yield workers
    except BaseException:
        print(*(worker.log.read_text() for worker in workers), sep="\n")
        raise
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture
def worker(redis_broker: Broker, world: World) -> Iterator[Worker]:
    with working("operations.fake_service") as (only,):
        yield only


def ask(world: World, name: str, what: str = "work") -> str:
    """An operation on a server of its own, and its message."""
    server = world.server(name)
    operation = world.submit(TakeSnapshot(server=server.id, description=what))
    outbox.flush()
    return operation


def ended(world: World, operation: str) -> Operation:
    """The row, once the operation has ended."""
    wait_for(lambda: world.row(operation).state in ENDED, 90)
    return world.row(operation)
