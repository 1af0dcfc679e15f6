"""Is this Celery process any good? It says so itself, in a file that a health check reads.

A thread of the main process writes `TRIPTYCH_LIVENESS_FILE` every few seconds: first `ok` or
`failed`, then one line for each thing that the process depends on. A file that is not written
any more says that the process hangs. The container's `healthy` script reads it: starting Python
for each look would cost more than the work itself.

libvirt is not asked for: a host whose libvirt is away is shown as such by the API, and another
container would not bring it back.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from celery import Celery, bootsteps
from sqlalchemy import text

from shared.broker import redis_client
from shared.database import reading
from shared.settings import settings

log = structlog.get_logger()

EVERY = 5.0
"""Seconds between two reports."""
PATIENCE = 30.0
"""Seconds without a turn of the consumer's loop, after which it is taken to be stuck."""


class Pulse(bootsteps.StartStopStep):
    """Beats from within the event loop of the consumer, for as long as that is connected."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    last = 0.0

    def start(self, consumer: Any) -> None:
        Pulse.last = time.monotonic()
        self._timer = consumer.timer.call_repeatedly(1.0, self._beat)

    def stop(self, consumer: Any) -> None:
        self._timer.cancel()

    @staticmethod
    def _beat() -> None:
        Pulse.last = time.monotonic()


def install(app: Celery) -> None:
    """Have the workers of `app` report, if the settings name a file."""
    if settings().liveness_file:
        app.steps["consumer"].add(Pulse)


def start() -> None:
    """Begin to report, from the main process of a worker that is ready."""
    if path := settings().liveness_file:
        threading.Thread(target=_report_forever, args=(path,), name="liveness", daemon=True).start()


def _report_forever(path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    while True:
        try:
            partial.write_text(report())
            partial.replace(path)
        except OSError as error:
            log.warning("liveness.unwritten", reason=str(error))
        time.sleep(EVERY)


def report() -> str:
    """`ok` or `failed`, then a line for each dependency."""
    found = {name: _outcome(check) for name, check in CHECKS.items()}
    verdict = "ok" if set(found.values()) == {"ok"} else "failed"
    return "".join([f"{verdict}\n", *(f"{name}: {said}\n" for name, said in found.items())])


def _outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def _database() -> None:
    with reading() as session:
        session.execute(text("SELECT 1"))


def _broker() -> None:
    redis_client().ping()


def _consumer() -> None:
    silent = time.monotonic() - Pulse.last
    if silent > PATIENCE:
        raise TimeoutError(f"its loop has not turned for {silent:.0f} s")


CHECKS: dict[str, Callable[[], None]] = {
    "database": _database,
    "broker": _broker,
    "consumer": _consumer,
}
"""What is looked at, by name; a check that fails raises. A service may add its own."""
