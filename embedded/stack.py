"""Starts and stops the processes of the embedded stack and knows where they keep things.

Everything lies in one state directory: the database, Redis's data, logs, pids and `env`,
the file (mode 0600) to source for the client. Settings that are set in the environment are
taken as they are, and kept for the next start; the rest is filled in.
"""

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVICES = ("snapshotter", "imager", "cloner")
CELERY = (sys.executable, "-m", "celery")
ALONE = ("--without-gossip", "--without-mingle")
"""Workers need not know of each other; asking around at the start costs a second."""
WARM_SHUTDOWN = 40.0
"""Seconds a worker may take to finish what it does before it is killed."""


class StackError(RuntimeError):
    """The stack cannot be started; the message says what to look at."""


class AlreadyRunning(StackError):
    """There is nothing to start."""


_kept_ports: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody is given a second time while this process lives.

    Who is to listen there comes seconds later. So it stays bound here, which is no hindrance to
    servers: they bind with SO_REUSEADDR, and nobody listens here.
    """
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _kept_ports.append(probe)
    port: int = probe.getsockname()[1]
    return port


@dataclass
class Stack:
    """One stack in `state`; `settings` are TRIPTYCH_ variables that win over the environment."""

    state: Path
    port: int = 8000
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.environment["TRIPTYCH_URL"]

    @property
    def token(self) -> str:
        environment = self.environment
        if "TRIPTYCH_TOKEN" in environment:
            return environment["TRIPTYCH_TOKEN"]
        return Path(environment["TRIPTYCH_TOKEN_FILE"]).read_text().strip()

    @property
    def environment(self) -> dict[str, str]:
        """The TRIPTYCH_ variables of a stack that was started."""
        lines = (self.state / "env").read_text().splitlines()
        words = (shlex.split(line)[1] for line in lines)
        return dict(word.split("=", 1) for word in words)

    # Starting

    def start(self) -> None:
        """Start all of it and wait until the API and the host's workers answer."""
        if self.running():
            raise AlreadyRunning(
                f"A stack runs already in {self.state}; it was left alone. Stop it first with "
                "`make down`."
            )
        _refuse_taken_port(self.port)
        kept = {each: each.read_text() for each in self._kept_files() if each.exists()}
        try:
            self._write_environment()
            self._start_all()
        except BaseException:
            for each in self._kept_files():  # the next start is not to keep what did not do
                each.unlink(missing_ok=True)
            for each, text in kept.items():
                each.touch(mode=0o600)
                each.write_text(text)
            raise

    def _kept_files(self) -> tuple[Path, Path]:
        return self.state / "env", self.state / "filled-in"

    def _start_all(self) -> None:
        if (self.state / "redis").is_dir():
            self.start_redis()
        self._run_once([sys.executable, "-m", "shared.database"], "migrate")
        self.start_api()
        for service in SERVICES:
            self.start_worker(service)
        self.start_beat()
        self.wait_ready()

    def start_redis(self) -> None:
        folder = self.state / "redis"
        port = self.environment["TRIPTYCH_BROKER_URL"].rsplit(":", 1)[1].split("/")[0]
        config = folder / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {folder}\nrequirepass {self._broker_password()}\n"
            'save ""\nappendonly yes\nmaxmemory-policy noeviction\n'
        )
        self._spawn("redis", ["redis-server", str(config)])
        self._wait_for_port(int(port), "redis")

    def start_api(self) -> None:
        self._spawn("api", [sys.executable, "-m", "services.api", "--port", str(self.port)])

    def start_worker(self, service: str) -> None:
        app = f"services.{service}.tasks"
        self._spawn(service, [*CELERY, "-A", app, "worker", *ALONE])

    def start_beat(self) -> None:
        command = [*CELERY, "-A", "shared.beat", "worker", "--concurrency", "2", *ALONE]
        self._spawn("beat", command)

    def wait_ready(self, timeout: float = 60) -> None:
        host = self.environment["TRIPTYCH_HOST"]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for name in ("api", *SERVICES, "beat"):
                if not self._alive(name):
                    raise StackError(f"{name} ended at its start; see {self._log(name)}")
            ready = self._ask("/readyz").get("status") == "ok"
            seen = self._ask(f"/v1/hosts/{host}") if ready else {}
            if seen.get("answering"):
                return
            time.sleep(0.1)
        raise StackError(
            seen.get("problem")
            or f"The stack did not come up in {timeout:.0f} s; see {self.state / 'log'}"
        )

    # Stopping

    def stop(self) -> None:
        """Stop what this state directory's pids name, workers first and warmly."""
        for names in (("beat", *SERVICES), ("api",), ("redis",)):
            for name in names:
                self.signal(name, signal.SIGTERM)
            for name in names:
                self._wait_gone(name, WARM_SHUTDOWN)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signal one process of the stack; with SIGKILL also its children."""
        if not self._alive(name):
            return
        pid = self.pid(name)
        if number == signal.SIGKILL:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)

    def pid(self, name: str) -> int:
        return self._identity(name)[0]

    def _identity(self, name: str) -> tuple[int, str]:
        pid, _, born = (self.state / "run" / f"{name}.pid").read_text().partition(" ")
        return int(pid), born

    def running(self) -> bool:
        return any(self._alive(name) for name in ("redis", "api", *SERVICES, "beat"))

    # How

    def _write_environment(self) -> None:
        for folder in (self.state, self.state / "log", self.state / "run"):
            folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        given = self._given()
        defaults = {
            "TRIPTYCH_TOKEN": self._kept_secret("token"),
            "TRIPTYCH_DATABASE_URL": f"sqlite:///{self.state.absolute()}/triptych.db",
            "TRIPTYCH_BROKER_URL": f"redis://:{self._broker_password()}@127.0.0.1:{free_port()}/0",
            "TRIPTYCH_HOST": "local",
            "TRIPTYCH_VAULT": str(self.state.absolute() / "vault"),
        }
        filled = {
            name: value
            for name, value in defaults.items()
            if name not in given and f"{name}_FILE" not in given
        }
        environment = {**filled, **given, "TRIPTYCH_URL": f"http://127.0.0.1:{self.port}"}
        Path(environment["TRIPTYCH_VAULT"]).mkdir(mode=0o711, parents=True, exist_ok=True)
        redis = self.state / "redis"
        if "TRIPTYCH_BROKER_URL" in filled:
            redis.mkdir(mode=0o700, exist_ok=True)
        elif redis.is_dir():
            redis.rename(self.state / f"redis-until-{time.time_ns()}")
        (self.state / "filled-in").write_text("\n".join(filled))
        path = self.state / "env"
        path.touch(mode=0o600)
        lines = (f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        path.write_text("".join(sorted(lines)))

    def _given(self) -> dict[str, str]:
        """What the caller set, now or at an earlier start; set to nothing, it is filled in again.

        A shell that sourced our own `env` hands back what we had filled in: that is not the
        caller's.
        """
        before: dict[str, str] = {}
        ours: dict[str, str] = {}
        own_broker = f":{self._broker_password()}@127.0.0.1:"  # on another port at each start
        if (self.state / "filled-in").exists():
            names = {"TRIPTYCH_URL", *(self.state / "filled-in").read_text().split()}
            for name, value in self.environment.items():
                (ours if name in names or own_broker in value else before)[name] = value
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("TRIPTYCH_") and ours.get(name) != value and own_broker not in value
        }
        now = inherited | self.settings
        kept = {name: value for name, value in before.items() if _one_way(name) not in now}
        return {name: value for name, value in (kept | now).items() if value}

    def _kept_secret(self, name: str) -> str:
        path = self.state / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(32))
        return path.read_text()

    def _broker_password(self) -> str:
        return self._kept_secret("broker-password")

    def _process_environment(self) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("TRIPTYCH_")},
            **self.environment,
            "PYTHONPATH": str(ROOT),
        }

    def _spawn(self, name: str, command: list[str]) -> None:
        with self._log(name).open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._process_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=0o077,
            )
        (self.state / "run" / f"{name}.pid").write_text(f"{process.pid} {_born(process.pid)}")

    def _run_once(self, command: list[str], name: str) -> None:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._process_environment(),
            capture_output=True,
            text=True,
            umask=0o077,
        )
        if done.returncode:
            raise StackError(f"{name} failed: {done.stderr.strip()[-2000:]}")

    def _log(self, name: str) -> Path:
        return self.state / "log" / f"{name}.log"

    def _alive(self, name: str) -> bool:
        """Whether the pid is ours and lives: a pid that was given to somebody else is not."""
        try:
            pid, born = self._identity(name)
            _reap(pid)
            return _born(pid) == born
        except (OSError, ValueError):
            return False

    def _wait_gone(self, name: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._alive(name):
            if time.monotonic() > deadline:
                self.signal(name, signal.SIGKILL)
            time.sleep(0.05)
        (self.state / "run" / f"{name}.pid").unlink(missing_ok=True)

    def _wait_for_port(self, port: int, name: str) -> None:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        raise StackError(f"{name} does not listen on port {port}; see {self._log(name)}")

    def _ask(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310  our own http:// address
            self.url + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
                body: dict[str, Any] = json.load(answer)
                return body
        except (OSError, urllib.error.URLError, ValueError):
            return {}


def _one_way(name: str) -> str:
    """The other name by which the same is set: a secret, or the file that it is in."""
    return name.removesuffix("_FILE") if name.endswith("_FILE") else f"{name}_FILE"


def _refuse_taken_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(
                f"Port {port} of 127.0.0.1 is taken, so nothing was started. Choose another: "
                "`make up PORT=8080`."
            ) from error


def _born(pid: int) -> str:
    """When the process started, in ticks since boot: with its pid, an identity (proc(5)).

    Raises OSError when it is gone, or has ended and only waits for its parent.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return fields[19]


def _reap(pid: int) -> None:
    """A child of this very process that has ended stays in /proc until it is waited for."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
