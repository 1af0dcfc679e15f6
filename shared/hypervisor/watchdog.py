"""The helper that gives a guest back when the worker that paused it is gone.

Owns: the helper process (`python -m shared.hypervisor.watchdog URI PARENT`) and
its client, `Watchdog`. A worker arms the helper before it suspends or freezes a
guest. When the worker dies, by SIGKILL too, its pipe ends and the helper
resumes or thaws what is armed; it does the same when a worker is alive but
holds a guest past the deadline. It runs in a session of its own and outlives
the worker just as long as it has something to give back.

It cannot outlive the container or cgroup it runs in: for that case there is
the operation's journal.

The helper's lines, each answered by one: `arm TOKEN UUID ACTION SECONDS` -> `ok`;
`disarm TOKEN` -> `ok` or `fired`; `fire TOKEN` -> `ok`.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import libvirt

from shared.hypervisor.errors import WatchdogUnavailable

Action = Literal["resume", "thaw"]

DEADLINE_S = 30.0
# A suspend that the dead worker had sent may still wait for the domain's job
# lock, 30 s by libvirt's own hard-coded limit, so a guest found running is
# looked at again for that long.
LINGER_S = 35.0
# libvirtd may be down for long; a guest stays paused meanwhile, and so we stay.
GIVE_UP_S = 24 * 3600.0
AGENT_TIMEOUT_S = 10


@dataclass
class Arm:
    """One armed action; `fired` tells after disarming that the helper acted."""

    token: int
    uuid: str
    action: Action
    fired: bool = False


class Watchdog:
    """The worker's end. One per process; safe to use from several threads."""

    def __init__(self, uri: str, *, answer_timeout_s: float = 10.0) -> None:
        self.uri = uri
        self._answer_timeout_s = answer_timeout_s
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._tokens = 0
        self._armed: dict[int, str] = {}

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
            self._ensure()
            self._tokens += 1
            line = f"arm {self._tokens} {uuid} {action} {deadline_s}"
            if self._ask(line) != "ok":
                raise WatchdogUnavailable(
                    "The helper that would resume the guest did not confirm; the guest was "
                    "not touched. Try again; if it persists, restart the worker."
                )
            self._armed[self._tokens] = line
            return Arm(self._tokens, uuid, action)

    def disarm(self, arm: Arm) -> bool:
        """Take an action back. True when the helper had already acted on it."""
        with self._lock:
            self._armed.pop(arm.token, None)
            with contextlib.suppress(WatchdogUnavailable):
                arm.fired = self._ask(f"disarm {arm.token}") == "fired"
            if self._armed and self.pid is None:
                with contextlib.suppress(WatchdogUnavailable):
                    self._ensure()  # another thread's guest must not go unguarded
            return arm.fired

    def fire(self, arm: Arm) -> None:
        """Hand the action over to the helper now: it goes on trying after we gave up."""
        with self._lock, contextlib.suppress(WatchdogUnavailable):
            self._armed.pop(arm.token, None)
            self._ask(f"fire {arm.token}")
            arm.fired = True

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

    def _ensure(self) -> None:
        if self._owner != os.getpid():
            # A fork copied us: the helper and what is armed belong to the parent.
            self._helper, self._armed = None, {}
        if self._helper is not None and self._helper.poll() is None:
            return
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            self._helper = subprocess.Popen(
                [sys.executable, "-m", __name__, self.uri, str(os.getpid())],
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


class _Helper:
    """The helper's side: what is armed, and a thread for each thing acted upon."""

    def __init__(self, uri: str, out: IO[bytes]) -> None:
        self.uri = uri
        self.out = out
        self.armed: dict[str, tuple[str, Action, float]] = {}
        self.fired: set[str] = set()
        self.rescues: list[threading.Thread] = []

    def serve(self, stdin: int, parent: int) -> None:
        """Answer lines until the worker's pipe ends or the worker is dead."""
        poller = select.poll()
        poller.register(stdin, select.POLLIN | select.POLLHUP)
        # A process forked off the worker may keep the pipe open after its death.
        with contextlib.suppress(OSError):
            poller.register(os.pidfd_open(parent), select.POLLIN)
        self._answer("ready")
        rest = b""
        while os.getppid() == parent:
            events = dict(poller.poll(self._until_deadline_ms()))
            self._fire_overdue()
            if stdin in events:
                data = os.read(stdin, 65536)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._answer(self.obey(line.decode()))
            elif events:
                break  # the worker is dead
        for token in list(self.armed):
            self.fire(token)
        for rescue in self.rescues:
            rescue.join()

    def obey(self, line: str) -> str:
        match line.split():
            case ["arm", token, uuid, ("resume" | "thaw") as action, seconds]:
                self.armed[token] = (uuid, action, time.monotonic() + float(seconds))
                return "ok"
            case ["disarm", token]:
                self.armed.pop(token, None)
                if token in self.fired:
                    self.fired.discard(token)
                    return "fired"
                return "ok"
            case ["fire", token]:
                self.fire(token)
                return "ok"
        return "what?"

    def fire(self, token: str) -> None:
        if token not in self.armed:
            return
        uuid, action, _ = self.armed.pop(token)
        self.fired.add(token)
        rescue = threading.Thread(target=give_back, args=(self.uri, uuid, action), daemon=True)
        rescue.start()
        self.rescues.append(rescue)

    def _fire_overdue(self) -> None:
        now = time.monotonic()
        for token in [t for t, (_, _, deadline) in self.armed.items() if deadline <= now]:
            self.fire(token)

    def _until_deadline_ms(self) -> int | None:
        if not self.armed:
            return None
        nearest = min(deadline for _, _, deadline in self.armed.values())
        return max(0, int((nearest - time.monotonic()) * 1000) + 1)

    def _answer(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody is left to read it
            self.out.write(line.encode() + b"\n")
            self.out.flush()


def give_back(uri: str, uuid: str, action: Action, linger_s: float = LINGER_S) -> bool:
    """Resume or thaw a domain, trying until it is done. True if something was done.

    Resumes only a domain that is paused because somebody asked for it. Uses
    connections of its own, without an event loop, so that nothing but libvirtd
    can be in its way. Gives up `linger_s` seconds after it first saw nothing to
    do, or a day after it started.
    """
    begun, reached, pause_s = time.monotonic(), 0.0, 0.05
    while time.monotonic() - begun < GIVE_UP_S:
        with contextlib.suppress(libvirt.libvirtError):
            connection = libvirt.open(uri)
            try:
                outcome = _attempt(connection, uuid, action)
            finally:
                connection.close()
            if outcome is not None:
                _say(f"{action} {uuid}: {'done' if outcome else 'nothing to do'}")
                return outcome
            reached = reached or time.monotonic()
        if reached and time.monotonic() - reached > linger_s:
            _say(f"{action} {uuid}: nothing to do")
            return False
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 1.0)
    return False


def _attempt(connection: Any, uuid: str, action: Action) -> bool | None:
    """One try. True: done; False: nothing to do, ever; None: look again."""
    try:
        domain = connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        return False
    paused = state == libvirt.VIR_DOMAIN_PAUSED
    if action == "resume":
        if not (paused and reason == libvirt.VIR_DOMAIN_PAUSED_USER):
            return None
        domain.resume()
        return True
    if paused:
        return None  # its agent cannot answer
    domain.agentSetResponseTimeout(AGENT_TIMEOUT_S)
    domain.fsThaw()
    return True


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"triptych watchdog: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """`python -m shared.hypervisor.watchdog URI PARENT-PID`"""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    helper = _Helper(sys.argv[1], sys.stdout.buffer)
    helper.serve(sys.stdin.fileno(), int(sys.argv[2]))


if __name__ == "__main__":
    main()
