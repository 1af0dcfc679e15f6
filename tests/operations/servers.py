"""A PostgreSQL and a Redis in containers of the tests' own, to take away and bring back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from operations.waiting import wait_for
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from testcontainers.core.container import DockerContainer

from embedded.stack import free_port
from lab.containers import Engine

POSTGRES, REDIS = "postgres:17", "redis:8"


class Server:
    """A container with one port, which stays the same when it is started again."""

    def __init__(self, image: str, port: int, command: str, **environment: str) -> None:
        self.port = free_port()
        self._container = (
            DockerContainer(image)
            .with_envs(**environment)
            .with_command(command)
            .with_bind_ports(f"{port}/tcp", self.port)
        )
        self._container.start()
        self._wait()

    def stop(self) -> None:
        """As a crash does."""
        self._container.get_wrapped_container().kill()

    def start(self) -> None:
        self._container.get_wrapped_container().start()
        self._wait()

    def process(self, inside: int) -> int:
        """The number that a process of the container has on this machine."""
        container = self._container.get_wrapped_container()
        container.reload()
        space = Path(f"/proc/{container.attrs['State']['Pid']}/ns/pid").readlink()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                numbers = re.search(r"^NSpid:(.*)$", (entry / "status").read_text(), re.MULTILINE)
                ours = (entry / "ns/pid").readlink() == space
                if ours and numbers and int(numbers[1].split()[-1]) == inside:
                    return int(entry.name)
        raise ProcessLookupError(inside)

    def remove(self) -> None:
        self._container.stop()

    def _wait(self) -> None:
        wait_for(self._answers, 60)

    def _answers(self) -> bool:
        raise NotImplementedError


class Postgres(Server):
    def __init__(self) -> None:
        command = "postgres -c fsync=off -c max_connections=200"
        super().__init__(
            POSTGRES, 5432, command, POSTGRES_USER="triptych", POSTGRES_PASSWORD="triptych"
        )

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://triptych:triptych@127.0.0.1:{self.port}/{name}"

    def create(self, name: str, template: str = "template0") -> str:
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        engine.dispose()
        return self.url(name)

    def _answers(self) -> bool:
        engine = create_engine(self.url("triptych"))
        try:
            with engine.connect():
                return True
        except OperationalError:
            return False
        finally:
            engine.dispose()


class Broker(Server):
    def __init__(self) -> None:
        super().__init__(REDIS, 6379, "redis-server --save '' --protected-mode no --bind 0.0.0.0")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def queued(self, queue: str) -> int:
        length: Any = self.client.llen(f"triptych:{queue}")
        return int(length)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.client.ping())
        return False


@pytest.fixture(scope="session")
def postgres(engine: Engine) -> Iterator[Postgres]:
    engine.ensure(POSTGRES)
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def redis_server(engine: Engine) -> Iterator[Broker]:
    engine.ensure(REDIS)
    server = Broker()
    yield server
    server.remove()
