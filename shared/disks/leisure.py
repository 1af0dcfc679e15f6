"""BLAKE3 of a disk when there is time: in a process of its own, that gives way to all others.

Owns: the helper (`python -m shared.disks.leisure DISK WORKERS PARENT`) and `digest`, which waits
for it. Not a thread: one that is put off in the middle of a step would hold Python's lock, and
with it the worker's heartbeat and whoever looks after the dead, for as long.

Where the disk's scheduler knows priorities, it reads when nobody else does. Where it does not,
this still holds: it rests as long as each piece took, and nine times as long while an operation
is going on (there is a file in the directory WORKERS then, see shared.operations.presence).
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.disks import digest as plain
from shared.errors import Cancelled
from shared.idle import give_way

REST, REST_BESIDE_WORK = 1, 9
"""Times of what a piece took."""
_LONGEST_REST_S = 5.0
_LOOK_EVERY_S = 0.2
_GONE = 3
_STOPPED = "The digest was given up, since the worker ends; it is begun again."


def digest(path: Path, workers: Path, stopping: Callable[[], bool]) -> str:
    """The hex digest of `path`, which may be deleted meanwhile: its blocks are free at once.

    Raises FileNotFoundError then, Cancelled within a moment of `stopping()` turning true, and
    OSError where the file cannot be read or the helper not be started.
    """
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    me = str(os.getpid())
    helper = subprocess.Popen(
        # From its first step: to start Python takes a tenth of a second of a core.
        ["nice", "-n", "19", sys.executable, "-m", __name__, str(path), str(workers), me],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": search},
    )
    with helper:
        try:
            found, complaint = _answer(helper, stopping)
        except BaseException:
            helper.kill()
            raise
    if helper.returncode == _GONE:
        raise FileNotFoundError(path)
    if helper.returncode:
        raise OSError(complaint.strip() or f"the helper ended with {helper.returncode}")
    return found.strip()


def _answer(helper: "subprocess.Popen[str]", stopping: Callable[[], bool]) -> tuple[str, str]:
    while True:
        if stopping():
            raise Cancelled(_STOPPED)
        try:
            return helper.communicate(timeout=_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            continue


def main(path: str, workers: str, parent: str) -> int:
    """The helper: 0 with the digest on stdout, 3 where the file is gone, 1 with the reason."""
    give_way()
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        pace = _Pace(file.fileno(), Path(workers), int(parent))
        found = plain.digest(Path(path), pace.rest, pace.pointless)
    print(found)
    return 0


class _Pace:
    """Rests after each piece; tells when going on makes no sense."""

    def __init__(self, descriptor: int, workers: Path, parent: int) -> None:
        self.descriptor, self.workers, self.parent = descriptor, workers, parent
        self._since = time.monotonic()

    def rest(self, _done: int) -> None:
        took = time.monotonic() - self._since
        times = REST_BESIDE_WORK if self._beside_work() else REST
        time.sleep(min(_LONGEST_REST_S, took * times))
        self._since = time.monotonic()

    def pointless(self) -> bool:
        """Whether the worker has died, or the file has lost its last name."""
        if os.fstat(self.descriptor).st_nlink == 0:
            raise FileNotFoundError
        return os.getppid() != self.parent

    def _beside_work(self) -> bool:
        try:
            with os.scandir(self.workers) as entries:
                return next(entries, None) is not None
        except OSError:
            return False


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except FileNotFoundError:
        sys.exit(_GONE)
    except (OSError, Cancelled) as error:
        sys.exit(str(error))
