"""Named points between the steps of an operation, at which tests make it fail.

Nothing happens at them unless `TRIPTYCH_FAULTS` names a directory, which nobody but the tests
sets. Then each point that is passed is written to its file `passed`, and its file `armed` lists
what is to be done, one after the other, each once its point is passed: `kill` (SIGKILL to this
process), `raise`, or `wait` until a file `go` is there, while the test does something to the
world. After the last one that file is gone.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

_DIRECTORY = os.environ.get("TRIPTYCH_FAULTS")
_first = threading.Lock()
"""What is to be done at a point befalls the first of the threads that pass it."""


class Injected(RuntimeError):
    """A test asked for this error."""


def point(name: str) -> None:
    """Something has just been done, or is about to be; see the callers. May raise Injected."""
    if _DIRECTORY:
        _pass(Path(_DIRECTORY), name)


def _pass(directory: Path, name: str) -> None:
    with _first, (directory / "passed").open("a") as passed:
        passed.write(f"{name}\n")
        try:
            (at, fault), *rest = json.loads((directory / "armed").read_text())
        except FileNotFoundError:
            return
        if at != name:
            return
        if rest:
            (directory / "rest").write_text(json.dumps(rest))
            (directory / "rest").rename(directory / "armed")
        else:
            (directory / "armed").unlink()
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise Injected(f"an error was asked for at {name!r}")
        case "wait":
            while not (directory / "go").exists():
                time.sleep(0.005)
