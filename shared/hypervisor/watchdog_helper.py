"""The watchdog's other end: the process that gives a guest back when its worker is gone.

`python -m shared.hypervisor.watchdog_helper URI PARENT HOLDS`. What it is told, and when it
acts, is in `watchdog.py`.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import libvirt

from shared.hypervisor.agent_timeout import answers_within
from shared.hypervisor.domains import ASKED_FOR
from shared.hypervisor.errors import WatchdogUnavailable
from shared.hypervisor.saving import STEP_S, end_save, forget, note_of
from shared.hypervisor.watchdog import GIVE_UP_S, Action, hold_of, locked

# A suspend that the dead worker had sent, and not yet seen the end of, may still
# wait for the domain's job lock, 30 s by libvirt's own hard-coded limit, so that a
# guest found running is looked at again for that long.
LINGER_S = 35.0
AGENT_TIMEOUT_S = 10
OWED = ".owed"
"""What the names of files end with, beside the locks, that name domains still to be thawed."""
_own_threads: dict[str, threading.Lock] = {}
"""The lock of a file is the process's: it does not keep its threads apart."""


class _Helper:
    """The helper's side: what is armed, and a thread for each thing acted upon."""

    def __init__(self, uri: str, holds: Path, out: IO[bytes]) -> None:
        self.uri, self.holds = uri, holds
        self.out = out
        self.armed: dict[str, tuple[str, Action, float]] = {}
        self.held: set[str] = set()
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
                    if answer := self.obey(line.decode()):
                        self._answer(answer)
            elif events:
                break  # the worker is dead
        for token in list(self.armed):
            self.fire(token, self.holds)
        for rescue in self.rescues:
            rescue.join()

    def obey(self, line: str) -> str:
        match line.split():
            case ["arm", token, uuid, ("resume" | "release" | "thaw") as action, seconds]:
                self.armed[token] = (uuid, action, time.monotonic() + float(seconds))
                return "ok"
            case ["held", token]:
                self.held.add(token)
                return ""
            case ["disarm", token]:
                self.armed.pop(token, None)
                self.held.discard(token)
                if token in self.fired:
                    self.fired.discard(token)
                    return "fired"
                return "ok"
            case ["fire", token]:
                # A later freeze of this guest, by somebody alive, is not to be thawed.
                late_thaw = token in self.armed and self.armed[token][1] == "thaw"
                self.fire(token, self.holds if late_thaw else None)
                return "ok"
        return "what?"

    def fire(self, token: str, holds: Path | None = None) -> None:
        """Act, whoever holds the guest; with `holds` only while nobody alive does."""
        if token not in self.armed:
            return
        uuid, action, _ = self.armed.pop(token)
        self.fired.add(token)
        linger_s = 0.0 if token in self.held else LINGER_S
        work = partial(give_back, self.uri, uuid, action, self.holds, linger_s, holds)
        if action == "thaw":
            work = partial(_noted, _note(self.holds, uuid), work)
        rescue = threading.Thread(target=work, daemon=True)
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


def thaw_owed(uri: str, holds: Path) -> None:
    """Begin to thaw what helpers owe that were killed, with the container they were in.

    At a worker's start: of a freeze that was given up, and may come true long after, no
    operation's journal tells.
    """
    for note in holds.glob(f"*{OWED}"):
        thaw = partial(give_back, uri, note.stem, "thaw", holds, holds=holds)
        threading.Thread(target=_noted, args=(note, thaw), daemon=True).start()


def _note(holds: Path, uuid: str) -> Path:
    note = holds / f"{uuid}{OWED}"
    with contextlib.suppress(OSError):  # the disk is full: it is thawed all the same
        note.touch()
    return note


def _noted(note: Path, thaw: Callable[[], bool]) -> bool:
    done = thaw()
    note.unlink(missing_ok=True)
    return done


def give_back(
    uri: str,
    uuid: str,
    action: Action,
    notes: Path,
    linger_s: float = LINGER_S,
    holds: Path | None = None,
) -> bool:
    """Resume or thaw a domain, trying until it is done. True if something was done.

    `notes` is where it is noted that a guest is held (`saving`). With `holds`, nothing is done
    while somebody alive holds the domain. Resumes only a domain that is paused because somebody
    asked for it. Uses connections of its own, without an event loop, so that nothing but libvirtd
    can be in its way. Gives up `linger_s` seconds after it first saw nothing to do, or a day after
    it started; a paused guest is yet to be thawed, and so is one whose memory was saved.
    """
    begun, reached, pause_s = time.monotonic(), 0.0, 0.05
    while time.monotonic() - begun < GIVE_UP_S:
        with contextlib.suppress(libvirt.libvirtError), _undisputed(holds, uuid, action) as ours:
            connection = libvirt.open(uri)
            try:
                if ours:
                    outcome = _attempt(connection, uuid, action, notes)
                else:  # a suspend that is under way may still come, whoever holds it now
                    outcome = None if linger_s else _watched(connection, uuid)
            finally:
                connection.close()
            if outcome is not None:
                _say(f"{action} {uuid}: {'done' if outcome else 'nothing to do'}")
                return outcome
            if ours and action != "thaw":
                reached = reached or time.monotonic()
        if reached and time.monotonic() - reached > linger_s:
            _say(f"{action} {uuid}: nothing to do")
            return False
        time.sleep(pause_s)
        # Once a minute has passed it is an agent that does not answer.
        patient = action == "thaw" and time.monotonic() - begun > 60
        pause_s = min(pause_s * 2, 10.0 if patient else 1.0)
    return False


def _watched(connection: Any, uuid: str) -> bool | None:
    """While somebody alive holds the domain: False once it is seen not to be paused."""
    try:
        state, _ = connection.lookupByUUIDString(uuid).state()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise
    return None if state == libvirt.VIR_DOMAIN_PAUSED else False


@contextlib.contextmanager
def _undisputed(holds: Path | None, uuid: str, action: Action) -> Iterator[bool]:
    """Whether nobody alive holds the domain, nor begins to until the block is left."""
    if holds is None:
        yield True
        return
    name = hold_of(uuid, action)
    with _own_threads.setdefault(name, threading.Lock()), _lock_of(holds, name) as ours:
        yield ours


@contextlib.contextmanager
def _lock_of(holds: Path, name: str) -> Iterator[bool]:
    try:
        lock = locked(holds, name, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    except WatchdogUnavailable:  # a full disk must not keep a guest paused
        yield True
        return
    try:
        yield True
    finally:
        os.close(lock)


def _attempt(connection: Any, uuid: str, action: Action, notes: Path) -> bool | None:
    """One try. True: done; False: nothing to do, ever; None: look again."""
    try:
        domain = connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            forget(note_of(notes, uuid))
            return False
        raise
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_SHUTOFF:  # from a saved memory it wakes up as it was
        return None if action == "thaw" and domain.hasManagedSaveImage() else False
    paused = state == libvirt.VIR_DOMAIN_PAUSED
    if action == "resume":
        if not (paused and reason in ASKED_FOR):
            return None
        domain.resume()
        return True
    if action == "release":
        return _release(domain, note_of(notes, uuid))
    if paused:
        return None  # its agent cannot answer
    with answers_within(domain, AGENT_TIMEOUT_S):
        domain.fsThaw()
    return True


def _release(domain: Any, note: Path) -> bool | None:
    """End the save of the memory, if it goes on, and resume the domain, if that paused it."""
    ended = False
    while (resumed := end_save(domain, note)) is None:
        ended = True
        time.sleep(STEP_S)
    return resumed or ended or None


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"triptych watchdog: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Serve the worker of that pid until it is gone and all is given back."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    helper = _Helper(sys.argv[1], Path(sys.argv[3]), sys.stdout.buffer)
    helper.serve(sys.stdin.fileno(), int(sys.argv[2]))


if __name__ == "__main__":
    main()
