"""A private PostgreSQL cluster, for the tests and for what `make bench` runs."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text


class Postgres:
    """A cluster on a Unix socket, of an unprivileged user, in a directory of its own.

    A `durable` one waits for the disk at each commit, as a deployment's does.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        self.directory = directory
        self._fsync = "on" if durable else "off"
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:  # initdb refuses root; the package brings this user
            account = pwd.getpwnam("postgres")
            os.chown(directory, account.pw_uid, account.pw_gid)
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        options = ("--auth=trust", "--username=triptych", "--no-sync", "--encoding=UTF8")
        self._run("initdb", *options, "--locale=C")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
        path = str(found[-1]) if found else program
        subprocess.run(
            [path, "-D", str(self.directory / "data"), *arguments],
            check=True,
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            **self._user,
        )

    def start(self) -> None:
        options = (
            f"-c fsync={self._fsync} -c listen_addresses='' "
            f"-c unix_socket_directories='{self.directory}'"
        )
        log = str(self.directory / "log")
        self._run("pg_ctl", "--wait", f"--log={log}", f"--options={options}", "start")

    def stop(self) -> None:
        """As a crash does."""
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://triptych@/{name}?host={self.directory}"

    def create(self, name: str, template: str = "template0") -> str:
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        engine.dispose()
        return self.url(name)


@contextlib.contextmanager
def postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A cluster that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="triptych-pg-"))
    try:
        cluster = Postgres(directory, durable=durable)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
