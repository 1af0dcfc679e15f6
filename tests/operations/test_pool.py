"""The processes of a worker: from its fork server, which has opened nothing, and gone with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from operations.spine import Broker, World, wait_for
from operations.workers import ROOT, Worker, ask, ended, working

from lab.processes import children_of, is_gone
from shared.commands import SERVICES

FORK_SERVER = "billiard.forkserver"


def fork_server(worker: Worker) -> int:
    """The pid of the worker's fork server, once it has all its children."""

    def ready() -> bool:
        servers = children_of(worker.process.pid, FORK_SERVER)
        return bool(servers) and len(children_of(servers[0])) == 2

    wait_for(ready, 90)
    (server,) = children_of(worker.process.pid, FORK_SERVER)
    return server


def test_a_child_that_died_is_replaced_by_the_same_server(worker: Worker, world: World) -> None:
    """Both processes that did the work had all imported already."""
    server = fork_server(worker)

    operation = ask(world, "one", "die")

    assert ended(world, operation).state == "succeeded"
    assert fork_server(worker) == server
    ran = {int(line.split()[2]) for line in worker.did() if line.startswith("run")}
    assert len(ran) == 2 and len(ran & set(children_of(server))) == 1


def test_all_go_with_the_main_process(worker: Worker, world: World) -> None:
    """No child works on whose main process was killed: its successor takes the work over."""
    server = fork_server(worker)
    ask(world, "one", "slow")
    wait_for(worker.did)
    all_of_it = [server, *children_of(server)]

    os.kill(worker.process.pid, signal.SIGKILL)

    wait_for(lambda: all(map(is_gone, all_of_it)), 5)


def test_a_fork_server_that_died_is_replaced(worker: Worker, world: World) -> None:
    """Its children go with it, and what they did is done by those of the next one."""
    server = fork_server(worker)
    operation = ask(world, "one", "slow")
    wait_for(worker.did)
    before = children_of(server)

    os.kill(server, signal.SIGKILL)
    (worker.vault / "go").touch()

    row = ended(world, operation)
    assert (row.state, row.attempt) == ("succeeded", 2)
    assert all(map(is_gone, before))
    assert fork_server(worker) != server
    assert worker.process.poll() is None


def test_a_swept_temporary_directory_ends_nothing(
    redis_broker: Broker, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's socket is gone with it: the next child comes from another server."""
    swept = tmp_path / "swept"
    swept.mkdir()
    monkeypatch.setenv("TMPDIR", str(swept))
    with working("operations.fake_service") as (worker,):
        before = fork_server(worker)
        for each in swept.glob("pymp-*/*"):
            each.unlink()
        operation = ask(world, "one", "die")
        assert ended(world, operation).state == "succeeded"
        servers = children_of(worker.process.pid, FORK_SERVER)
        assert before in servers and len(servers) == 2
        assert worker.process.poll() is None


def test_a_temporary_directory_with_a_long_name(
    redis_broker: Broker, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket fits there; children are new interpreters then."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with working("operations.fake_service") as (worker,):
        assert ended(world, ask(world, "one", "die")).state == "succeeded"
        assert not children_of(worker.process.pid, FORK_SERVER)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_lets_what_runs_end(worker: Worker, world: World, sent: int) -> None:
    """As from Ctrl-C, or from systemd at a stop: the server takes no child out of its work."""
    server = fork_server(worker)
    operation = ask(world, "one", "slow")
    wait_for(worker.did)

    os.kill(server, sent)
    os.kill(worker.process.pid, sent)
    (worker.vault / "go").touch()

    worker.process.wait(60)
    row = ended(world, operation)
    assert (row.state, row.attempt) == ("succeeded", 1)


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_forked_has_no_thread_and_no_connection(service: str) -> None:
    """A fork would leave either half there."""
    program = (
        f"import os, services.{service}.tasks\n"
        "print(len(os.listdir('/proc/self/task')))\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    if int(fd) > 2 and os.path.exists(f'/proc/self/fd/{fd}'):\n"
        "        print(os.readlink(f'/proc/self/fd/{fd}'))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    threads, *opened = said.stdout.splitlines()
    assert threads == "1"
    assert [each for each in opened if not each.startswith("/proc/")] == []
