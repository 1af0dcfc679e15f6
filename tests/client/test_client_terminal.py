"""The command line in a real terminal: the live bar, questions, Ctrl-C."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from fake_api import NOW, Fake, operation

# A terminal's Ctrl-C is not ignored, whatever this process has inherited.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from triptych.cli import main
main()
"""
REVERT = "POST /v1/servers/web1/snapshot/revert"


class Terminal:
    """The command in a pseudo-terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
            start_new_session=True,
        )
        os.close(slave)

    def read_until(self, text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not show up in {self.seen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.seen += os.read(self._master, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        """Reads on to the end, since a full terminal would block the command."""
        while True:
            try:
                chunk = os.read(self._master, 4096)
            except OSError:
                break
            if not chunk:
                break
            self.seen += chunk.decode(errors="replace")
        os.close(self._master)
        return self.process.wait(60)


@pytest.fixture
def snapshot(api: Fake) -> Iterator[Fake]:
    api.says("GET /v1/servers/web1/snapshot", {"id": "snp_1", "taken_at": NOW})
    yield api


def test_revert_asks_and_takes_no_for_an_answer(snapshot: Fake) -> None:
    """On a terminal the question says what is replaced; a no sends nothing."""
    terminal = Terminal("snapshot", "revert", "web1")
    terminal.read_until("[y/N]")
    assert "set aside for 24 hours" in terminal.seen
    terminal.type("n\n")
    assert terminal.end() == 2
    assert "Nothing was done." in terminal.seen
    assert snapshot.calls(REVERT) == []


def test_revert_goes_ahead_on_yes(snapshot: Fake) -> None:
    """A yes on the terminal is as good as --yes."""
    snapshot.starts(REVERT, operation(kind="snapshot.revert"))
    terminal = Terminal("snapshot", "revert", "web1")
    terminal.read_until("[y/N]")
    terminal.type("y\n")
    assert terminal.end() == 0
    assert "web1 is back at its snapshot" in terminal.seen


def test_live_bar_shows_phase_and_share(api: Fake) -> None:
    """A terminal sees phase, percentage and bytes while it waits, then the outcome."""
    running = operation(state="running", phase="copying", progress=40, finished_at=None)
    running |= {"bytes_done": 4 * 2**30, "bytes_total": 10 * 2**30}
    api.starts("POST /v1/images/golden/verify", running, running, operation(kind="image.verify"))
    terminal = Terminal("image", "verify", "golden")
    terminal.read_until("4.0 GiB of 10.0 GiB")
    assert "copying" in terminal.seen
    assert "40 %" in terminal.seen
    assert terminal.end() == 0
    assert "Image golden was verified" in terminal.seen


def test_live_bar_shows_why_it_waits(api: Fake) -> None:
    """The reason stands below the bar as long as there is one, whole on a narrow terminal."""
    reason = "Behind operation op_0 (image.create) on this server, and 3 more after it."
    queued = operation(state="queued", progress=0, finished_at=None, waiting=reason)
    api.starts("POST /v1/images/golden/verify", queued, queued, operation(kind="image.verify"))
    terminal = Terminal("image", "verify", "golden")
    terminal.read_until(reason)
    assert terminal.end() == 0
    assert "Image golden was verified" in terminal.seen


def test_ctrl_c_leaves_a_host_draining(api: Fake) -> None:
    """A terminal sees what is left to do; Ctrl-C ends the waiting only, and says what next."""
    draining = {"name": "kvm1", "draining": True, "silent": False, "problem": None}
    draining |= {"operations": {"queued": 2, "running": 1}}
    api.says("POST /v1/hosts/kvm1/drain", draining)
    api.says("GET /v1/hosts/kvm1", draining)
    terminal = Terminal("host", "drain", "kvm1")
    terminal.read_until("2 queued and 1 running")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "goes on draining" in terminal.seen
    assert "triptych host resume kvm1" in terminal.seen


def test_ctrl_c_says_that_the_operation_goes_on(api: Fake) -> None:
    """Ctrl-C ends the waiting only, and says how to watch and cancel the operation."""
    running = operation(state="running", phase="copying", progress=40, finished_at=None)
    api.starts("POST /v1/images/golden/verify", running)
    terminal = Terminal("image", "verify", "golden")
    terminal.read_until("copying")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "the operation goes on" in terminal.seen
    assert "triptych operation watch op_1" in terminal.seen
    assert "triptych operation cancel op_1" in terminal.seen
    assert api.calls("POST /v1/operations/op_1/cancel") == []


def test_reader_that_goes_away_is_no_error(api: Fake) -> None:
    """`triptych … | head -1` ends quietly."""
    rows = [{"id": f"srv_{n}", "name": f"server-{n}"} for n in range(20_000)]
    api.says("GET /v1/servers", {"items": rows, "next": None})
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "server", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
