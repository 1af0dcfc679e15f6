"""What `make up` and `make down` promise, on one stack that is started twice."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from triptych import Client

from embedded.stack import ROOT, SERVICES, Stack, StackError, free_port
from lab.guest import Guest
from lab.libvirtd import Hypervisor, scratch

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]
PROCESSES = ("redis", "api", *SERVICES, "beat")


@dataclass
class Shell:
    """A user's shell: what it runs inherits its variables, and those of a sourced `env`."""

    state: Path
    variables: dict[str, str]

    def run(self, action: str, *, sourced: bool = False) -> subprocess.CompletedProcess[str]:
        """`make up` or `make down`, for a stack whose things are kept in `state`."""
        command = [sys.executable, "-m", "embedded", action, "--state", str(self.state)]
        before = f". {shlex.quote(str(self.state / 'env'))} && " if sourced else ""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("TRIPTYCH_")}
        return subprocess.run(
            ["/bin/sh", "-c", f"{before}exec {shlex.join(command)}"],
            cwd=ROOT,
            env={**clean, **self.variables, "PORT": str(free_port())},
            capture_output=True,
            text=True,
        )


@dataclass
class Seen:
    """What a stack looks like from outside."""

    pids: dict[str, int]
    environment: dict[str, str]
    filled_in: set[str]
    ready: bool
    servers: list[str]

    @classmethod
    def of(cls, state: Path) -> Seen:
        stack = Stack(state)
        readiness = httpx.get(f"{stack.url}/readyz", timeout=60).json()
        with Client(stack.url, stack.token) as client:
            return cls(
                {name: stack.pid(name) for name in PROCESSES if stack._alive(name)},
                stack.environment,
                set((state / "filled-in").read_text().split()),
                readiness["status"] == "ok",
                [server["name"] for server in client.servers.list()],
            )


@dataclass
class Story:
    """Up, up again, down, down again, and up from a shell that sourced `env`."""

    up: subprocess.CompletedProcess[str]
    first: Seen
    up_again: subprocess.CompletedProcess[str]
    untouched: Seen
    downs: list[subprocess.CompletedProcess[str]]
    still_there: list[str]
    redis_answers: bool
    up_once_more: subprocess.CompletedProcess[str]
    second: Seen
    name: str


@pytest.fixture(scope="module")
def story(hypervisor: Hypervisor) -> Iterator[Story]:
    """The whole of it, told once: each start of a stack takes its seconds."""
    with (
        scratch() as folder,
        Guest.create(hypervisor, folder / "disks") as guest,
    ):
        state = folder / "state"
        # What the caller chose; all else is filled in.
        chosen = {"TRIPTYCH_LIBVIRT_URI": hypervisor.uri, "TRIPTYCH_CONCURRENCY": "1"}
        shell = Shell(state, chosen)
        try:
            up = shell.run("up")
            assert up.returncode == 0, up.stderr
            with Client(Stack(state).url, Stack(state).token) as client:
                client.servers.add("local", guest.name)
            first = Seen.of(state)
            up_again = shell.run("up")
            untouched = Seen.of(state)
            downs = [shell.run("down"), shell.run("down")]
            still_there = [name for name in PROCESSES if Stack(state)._alive(name)]
            redis_answers = answers(first.environment["TRIPTYCH_BROKER_URL"])
            pretend_an_older_default(state)
            up_once_more = Shell(state, {}).run("up", sourced=True)
            assert up_once_more.returncode == 0, up_once_more.stderr
            second = Seen.of(state)
        finally:
            Stack(state).stop()
        yield Story(
            up,
            first,
            up_again,
            untouched,
            downs,
            still_there,
            redis_answers,
            up_once_more,
            second,
            guest.name,
        )


def answers(broker_url: str) -> bool:
    port = int(broker_url.rsplit(":", 1)[1].split("/")[0])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def pretend_an_older_default(state: Path) -> None:
    """As if an older version, with another default, had filled in the host's name."""
    env = state / "env"
    before = env.read_text()
    env.write_text(before.replace("TRIPTYCH_HOST=local", "TRIPTYCH_HOST=older-default"))
    assert env.read_text() != before


def test_up_starts_all_of_it_and_says_how_to_use_and_stop_it(story: Story) -> None:
    """Six processes run, the API is ready, and the greeting names address, env and down."""
    assert set(story.first.pids) == set(PROCESSES)
    assert story.first.ready
    for word in (story.first.environment["TRIPTYCH_URL"], "env", "down"):
        assert word in story.up.stdout


def test_a_second_up_refuses_and_leaves_the_running_stack_alone(story: Story) -> None:
    """It exits non-zero and says so; processes, environment and API are as they were."""
    assert story.up_again.returncode == 1
    assert "runs already" in story.up_again.stderr
    assert "left alone" in story.up_again.stderr
    assert story.first == story.untouched


def test_down_leaves_no_process_and_no_redis(story: Story) -> None:
    """After down every process of the stack is gone, and nobody listens on Redis's port."""
    assert story.downs[0].returncode == 0
    assert story.still_there == []
    assert not story.redis_answers


def test_down_twice_is_harmless(story: Story) -> None:
    """The second down succeeds as the first did and says the same."""
    first, second = story.downs
    assert (first.returncode, first.stdout) == (second.returncode, second.stdout)
    assert second.stderr == ""


def test_up_again_finds_database_and_token(story: Story) -> None:
    """What was registered before is still known, to the same token."""
    assert [story.name] == story.first.servers == story.second.servers
    assert story.first.environment["TRIPTYCH_TOKEN"] == story.second.environment["TRIPTYCH_TOKEN"]
    assert set(story.second.pids) == set(PROCESSES)
    assert story.second.ready


def test_a_shell_that_sourced_env_freezes_no_default(story: Story) -> None:
    """What the stack filled in is not taken as the caller's: a changed default counts, and the
    address is that of the new port."""
    assert story.first.filled_in == story.second.filled_in
    assert "TRIPTYCH_HOST" in story.second.filled_in
    assert story.second.environment["TRIPTYCH_HOST"] == "local"
    assert story.first.environment["TRIPTYCH_URL"] != story.second.environment["TRIPTYCH_URL"]
    assert story.second.environment["TRIPTYCH_URL"] in story.up_once_more.stdout


def test_a_shell_that_sourced_env_keeps_what_the_caller_chose(story: Story) -> None:
    """Settings that the caller once gave are handed on by `env`."""
    for name in ("TRIPTYCH_LIBVIRT_URI", "TRIPTYCH_CONCURRENCY"):
        assert name not in story.second.filled_in
        assert story.first.environment[name] == story.second.environment[name]


def test_what_was_given_once_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next `make up` needs no vault on its command line; set to nothing, it is filled in."""
    vault = tmp_path / "vault of mine"

    def environment(given: str | None) -> dict[str, str]:
        with monkeypatch.context() as shell:
            for name in [each for each in os.environ if each.startswith("TRIPTYCH_")]:
                shell.delenv(name)
            if given is not None:
                shell.setenv("TRIPTYCH_VAULT", given)
            stack = Stack(tmp_path / "state", port=free_port())
            stack._write_environment()
            return stack.environment

    assert environment(str(vault))["TRIPTYCH_VAULT"] == str(vault)
    kept = environment(None)
    assert kept["TRIPTYCH_VAULT"] == str(vault)
    assert kept["TRIPTYCH_BROKER_URL"] != environment(None)["TRIPTYCH_BROKER_URL"]  # a free port
    assert environment("")["TRIPTYCH_VAULT"] == str(tmp_path / "state" / "vault")


def test_a_shell_that_sourced_env_long_ago_names_no_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is on another port at each start: that of an earlier one is nobody's."""
    stack = Stack(tmp_path / "state", port=free_port())
    stack._write_environment()
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        stack._write_environment()
        assert "TRIPTYCH_BROKER_URL" in (stack.state / "filled-in").read_text().split()


def test_what_did_not_come_up_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the environment that did overwritten by it."""
    stack = Stack(tmp_path / "state", port=free_port())
    stack._write_environment()
    before = stack.environment
    monkeypatch.setenv("TRIPTYCH_CONCURRENCY", "many")
    with pytest.raises(StackError):
        stack.start()
    stack.stop()
    assert stack.environment == before


def test_a_secret_takes_the_place_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other way round: what was kept does not stand beside what is given now."""
    file = tmp_path / "secret"
    file.write_text("s" * 32)
    stack = Stack(tmp_path / "state")
    for name, other, value in (
        ("TRIPTYCH_TOKEN_FILE", "TRIPTYCH_TOKEN", str(file)),
        ("TRIPTYCH_TOKEN", "TRIPTYCH_TOKEN_FILE", "t" * 32),
    ):
        with monkeypatch.context() as shell:
            shell.delenv(other, raising=False)
            shell.setenv(name, value)
            stack._write_environment()
        assert stack.environment[name] == value
        assert other not in stack.environment
