"""Owns a deployment by docker compose to test and measure: own name, port, secrets and images.

It is the deployment that users get, from the same files; what differs is said by variables and,
where a test needs more, by further compose files laid over them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from triptych import Client

from embedded.stack import ROOT, free_port
from lab.containers import Engine, locked, run
from lab.guest import Guest, attach
from lab.libvirtd import Hypervisor

BASES = ("debian:trixie-slim", "postgres:17", "redis:8")
TAG = os.environ.get("TRIPTYCH_LAB_TAG", "test")


@dataclass
class Deployment:
    """One compose project; `settings` are variables for its files."""

    engine: Engine
    state: Path
    project: str
    profiles: tuple[str, ...] = ("demo",)
    files: tuple[str, ...] = ("docker-compose.yml",)
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.secrets = Path(self.settings.get("TRIPTYCH_SECRETS", self.state / "secrets"))
        run([str(ROOT / "scripts/secrets"), str(self.secrets)])
        self.port = int(self.settings.setdefault("TRIPTYCH_PORT", str(free_port())))
        ours = {
            "TRIPTYCH_SECRETS": str(self.secrets),
            # Whatever is free: `docker compose port` tells.
            "TRIPTYCH_PROMETHEUS_PORT": "0",
            "TRIPTYCH_GRAFANA_PORT": "0",
            "TRIPTYCH_FLOWER_PORT": "0",
            "TRIPTYCH_TAG": TAG,
            # The default host must find nothing of this machine's.
            "TRIPTYCH_LIBVIRT_URI": "qemu+unix:///system?socket=/run/libvirt/nobody",
            "TRIPTYCH_VAULT": str(self.state / "vault"),
            "TRIPTYCH_DISKS": str(self.state / "disks"),
            "TRIPTYCH_TICK": "2",
            "TRIPTYCH_SCHEDULE_SPREAD": "0",
        }
        clean = {k: v for k, v in self.engine.environment.items() if not k.startswith("TRIPTYCH_")}
        self.environment = {**clean, **ours, **self.settings}

    def compose(self, *arguments: str, timeout: float = 600) -> str:
        """What `docker compose …` prints; raises CalledProcessError with its complaint."""
        command = [*self.engine.compose(), "--project-name", self.project, "--ansi", "never"]
        command += ["--env-file", os.devnull, "--project-directory", str(ROOT)]
        for file in self.files:
            command += ["--file", str(ROOT / file)]
        for profile in self.profiles:
            command += ["--profile", profile]
        return run([*command, *arguments], self.environment, timeout=timeout)

    def with_profiles(self, *profiles: str) -> Deployment:
        """The same project, for calls that need further profiles."""
        return replace(self, profiles=(*self.profiles, *profiles))

    def build(self) -> None:
        """Build the images from the working tree."""
        self.engine.ensure(*BASES)
        # One after the other: they share most layers, which the classic builder makes as often
        # as it is asked to at the same time.
        self.environment["COMPOSE_PARALLEL_LIMIT"] = "1"
        with locked("build"):
            self.compose("build", "--quiet", timeout=1800)

    def up(self, *services: str) -> None:
        """Create what is not there, start what does not run, and wait until it is healthy."""
        try:
            self.compose("up", "--detach", "--wait", "--no-build", *services)
        except subprocess.CalledProcessError as error:
            error.add_note(self.logs())
            raise

    def down(self, *, volumes: bool = True) -> None:
        self.compose("down", "--remove-orphans", *(["--volumes"] if volumes else []))

    def logs(self, *services: str, tail: int = 40) -> str:
        return self.compose("logs", "--no-color", "--tail", str(tail), *services)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.engine.docker("inspect", self.container(service)))[
            0
        ]
        return found

    def execute(self, service: str, *command: str) -> str:
        """What a command prints inside a service's container."""
        return self.compose("exec", "-T", service, *command)

    def cli(self, *arguments: str) -> Any:
        """What the command line in the API's container answers, as JSON."""
        return json.loads(self.execute("api", "triptych", "--json", *arguments))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.secrets / "token").read_text()

    @cached_property
    def client(self) -> Client:
        return Client(self.url, self.token)

    # The demo's hypervisor, whose guests are looked into from outside

    @cached_property
    def hypervisor(self) -> Hypervisor:
        socket = self.volume("demo-run") / "libvirt-sock"
        return Hypervisor(self.state, f"qemu+unix:///system?socket={socket}")

    def guest(self, name: str = "demo") -> Guest:
        return attach(self.hypervisor, name)

    def volume(self, name: str) -> Path:
        """Where one of the project's volumes is on this machine."""
        inspected = self.engine.docker("volume", "inspect", f"{self.project}_{name}")
        return Path(json.loads(inspected)[0]["Mountpoint"])


@contextmanager
def deployed(deployment: Deployment, *services: str) -> Iterator[Deployment]:
    """The deployment, built and up (these services and what they need); gone afterwards."""
    deployment.build()
    deployment.down()  # what a run that was killed has left, with secrets that are no more
    try:
        deployment.up(*services)
        yield deployment
    finally:
        deployment.down()
