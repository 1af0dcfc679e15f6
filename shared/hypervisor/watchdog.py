"""The helper that gives a guest back when the worker that paused it is gone.

Owns: the worker's end of it; the process itself is `watchdog_helper.py`. A worker arms the
helper before it suspends or freezes a guest. When the worker dies, by SIGKILL too, its pipe ends
and the helper resumes or thaws what is armed; it does the same when a worker is alive but holds a
guest past the deadline. It runs in a session of its own and outlives the worker just as long as
it has something to give back.

A guest that another worker holds by then is that one's, whose own helper is armed: whoever arms
holds a lock on a file named after the domain, in a directory that the host's workers share, and
the helper of a dead worker acts only while it has that lock to itself.

It cannot outlive the container or cgroup it runs in: for that case there is
the operation's journal.

The helper's lines: `arm TOKEN UUID ACTION SECONDS` -> `ok`; `held TOKEN`, which has no answer, as
the guest stands still; `disarm TOKEN` -> `ok` or `fired`; `fire TOKEN` -> `ok`.
"""

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.hypervisor.errors import WatchdogUnavailable

Action = Literal["resume", "release", "thaw"]
"""`release` ends a save of the guest's memory first, which would leave it paused."""

DEADLINE_S = 30.0
# libvirtd may be down for long; a guest stays paused meanwhile, and so we stay.
GIVE_UP_S = 24 * 3600.0
HELPER = "shared.hypervisor.watchdog_helper"


@dataclass
class Arm:
    """One armed action; `fired` tells after disarming that the helper acted."""

    token: int
    uuid: str
    action: Action
    fired: bool = False

    @property
    def hold(self) -> str:
        """The name of the lock: frozen and paused guests are held apart from each other."""
        return hold_of(self.uuid, self.action)


class Watchdog:
    """The worker's end. One per process; safe to use from several threads.

    `holds` is the directory of the domains' locks, one for all workers of the host.
    """

    def __init__(self, uri: str, holds: Path, *, answer_timeout_s: float = 10.0) -> None:
        self.uri, self.holds = uri, holds
        self._answer_timeout_s = answer_timeout_s
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._tokens = 0
        self._armed: dict[int, str] = {}
        self._held_by: dict[int, str] = {}
        self._locks: dict[str, int] = {}

    @property
    def pid(self) -> int | None:
        """The helper's process id while it runs."""
        return self._helper.pid if self._helper and self._helper.poll() is None else None

    def start(self) -> None:
        """Start the helper unless it runs. Raises WatchdogUnavailable."""
        with self._lock:
            self._ensure()

    def close(self) -> None:
        """End the helper; what is still armed it acts on first."""
        with self._lock:
            helper, self._helper = self._helper, None
            self._armed.clear()
            self._held_by.clear()
            for hold in list(self._locks):
                self._let_go(hold)
        if helper and self._owner == os.getpid():
            for pipe in (helper.stdin, helper.stdout):
                if pipe:
                    pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(5)

    def arm(self, uuid: str, action: Action = "resume", deadline_s: float = DEADLINE_S) -> Arm:
        """Have `uuid` resumed or thawed if this process dies, or after `deadline_s` seconds.

        Returns once the helper has confirmed. Raises WatchdogUnavailable, upon
        which the guest must not be paused.
        """
        with self._lock:
            arm = Arm(self._tokens + 1, uuid, action)
            if arm.hold not in self._locks:
                self._locks[arm.hold] = locked(self.holds, arm.hold, fcntl.LOCK_SH)
            try:
                self._ensure()
                self._tokens += 1
                line = f"arm {arm.token} {uuid} {action} {deadline_s}"
                if self._ask(line) != "ok":
                    raise WatchdogUnavailable(
                        "The helper that would resume the guest did not confirm; the guest was "
                        "not touched. Try again; if it persists, restart the worker."
                    )
            except BaseException:
                self._let_go(arm.hold)
                raise
            self._armed[arm.token] = line
            self._held_by[arm.token] = arm.hold
            return arm

    def held(self, arm: Arm) -> None:
        """Tell that the guest is paused by now: a pause that is seen later is somebody else's."""
        with self._lock:
            if self._helper and self._helper.stdin:
                with contextlib.suppress(
                    OSError
                ):  # it is gone, and its arms come back with another
                    self._helper.stdin.write(f"held {arm.token}\n".encode())
                    self._helper.stdin.flush()

    def disarm(self, arm: Arm) -> bool:
        """Take an action back. True when the helper had already acted on it."""
        with self._lock:
            self._forget(arm.token)
            with contextlib.suppress(WatchdogUnavailable):
                arm.fired = self._ask(f"disarm {arm.token}") == "fired"
            if self._armed and self.pid is None:
                with contextlib.suppress(WatchdogUnavailable):
                    self._ensure()  # another thread's guest must not go unguarded
            self._let_go(arm.hold)
            return arm.fired

    def fire(self, arm: Arm) -> None:
        """Hand the action over to the helper now: it goes on trying after we gave up."""
        with self._lock, contextlib.suppress(WatchdogUnavailable):
            self._forget(arm.token)
            self._ask(f"fire {arm.token}")
            arm.fired = True
            self._let_go(arm.hold)

    @contextlib.contextmanager
    def armed(
        self, uuid: str, action: Action = "resume", deadline_s: float = DEADLINE_S
    ) -> Iterator[Arm]:
        """Armed inside, disarmed at the end; `Arm.fired` is known after it."""
        arm = self.arm(uuid, action, deadline_s)
        try:
            yield arm
        finally:
            self.disarm(arm)

    def _forget(self, token: int) -> None:
        self._armed.pop(token, None)
        self._held_by.pop(token, None)

    def _let_go(self, hold: str) -> None:
        """Give up a lock that nothing armed needs any more."""
        if hold in self._locks and hold not in self._held_by.values():
            os.close(self._locks.pop(hold))

    def _ensure(self) -> None:
        if self._owner != os.getpid():
            # A fork copied us: the helper and what is armed belong to the parent.
            self._helper, self._armed, self._held_by, self._locks = None, {}, {}, {}
        if self._helper is not None and self._helper.poll() is None:
            return
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            self._helper = subprocess.Popen(
                [sys.executable, "-m", HELPER, self.uri, str(os.getpid()), str(self.holds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            raise WatchdogUnavailable(
                f"The helper that would resume the guest cannot be started ({error}); "
                "the guest was not touched."
            ) from error
        self._owner = os.getpid()
        if self._read() != "ready":
            self._drop()
            raise WatchdogUnavailable(
                "The helper that would resume the guest did not come up; the guest was not "
                "touched. Its reason is in the worker's log."
            )
        for line in self._armed.values():  # those that a dead helper had taken with it
            self._ask(line)

    def _ask(self, line: str) -> str:
        helper = self._helper
        if helper is None or helper.stdin is None:
            raise WatchdogUnavailable("The helper that would resume the guest is gone.")
        try:
            helper.stdin.write(line.encode() + b"\n")
            helper.stdin.flush()
        except OSError as error:
            raise WatchdogUnavailable(
                f"The helper that would resume the guest is gone ({error})."
            ) from error
        return self._read()

    def _read(self) -> str:
        helper = self._helper
        if helper is None or helper.stdout is None:
            return ""
        ready, _, _ = select.select([helper.stdout], [], [], self._answer_timeout_s)
        if not ready:
            # An answer that comes late would be taken for the next one's.
            self._drop()
            return ""
        return helper.stdout.readline().decode().strip()

    def _drop(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.kill()
            helper.wait()


def hold_of(uuid: str, action: Action) -> str:
    return f"{uuid}.{'frozen' if action == 'thaw' else 'paused'}"


def locked(holds: Path, name: str, how: int) -> int:
    """A lock on that file, of this process alone: a child that it forks has no part in it.

    Raises WatchdogUnavailable, and BlockingIOError where it is not to wait.
    """
    try:
        holds.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(holds / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise WatchdogUnavailable(
            f"The lock on the guest cannot be had in {holds} ({error}); the guest was not touched. "
            "Make that directory writable, or make room, and try again."
        ) from error
    try:
        fcntl.lockf(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:  # a network's storage may have no locks
        os.close(descriptor)
        raise WatchdogUnavailable(
            f"No lock can be had in {holds} ({error}); the guest was not touched. Put the vault on "
            "storage that has locks."
        ) from error
    return descriptor
