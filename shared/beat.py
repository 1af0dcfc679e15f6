"""Celery beat and the worker of its ticks, in one process: `celery -A shared.beat worker`.

Ticks only read and write the database, so they never wait behind a long copy. Two beats
by accident do no harm: each tick claims what is due in the database. Beat is a thread of the
worker: Celery's own `--beat` is a process, and where that is killed nobody notices.
"""

import threading
import time
from datetime import timedelta
from typing import Any

import structlog
from celery.beat import Scheduler
from celery.signals import setup_logging, task_success, worker_ready, worker_shutting_down

from shared import liveness, logs
from shared.celery_app import TICKS, make_app
from shared.settings import settings

log = structlog.get_logger()

AGAIN_S = 5.0
"""Until beat is begun again where it failed."""

app = make_app(
    "beat",
    [TICKS],
    # By name: what is shared imports no service; beat only needs their ticks.
    [
        "shared.operations.tasks",
        "services.snapshotter.expiry",
        "services.imager.ticks",
        "services.cloner.ticks",
    ],
)
app.set_default()
app.conf.worker_pool = "threads"
app.conf.worker_disable_prefetch = False
app.conf.beat_schedule = {
    name: {
        "task": name,
        "schedule": settings().tick,
        "options": {"queue": TICKS, "expires": max(settings().tick, 30)},
    }
    for name in (
        "snapshotter.expire_due",
        "imager.run_due_schedules",
        "cloner.expire_due",
        "operations.reconcile",
        "operations.forget_due",
        "events.relay",
    )
}
last_tick = time.monotonic()


@task_success.connect
def _ticked(**_: Any) -> None:
    global last_tick
    last_tick = time.monotonic()


def _ticks() -> None:
    silent = time.monotonic() - last_tick
    if silent > 2 * settings().tick + liveness.PATIENCE:
        raise TimeoutError(f"no tick has ended well for {silent:.0f} s")


liveness.CHECKS["ticks"] = _ticks
liveness.install(app)


class Steady(Scheduler):
    """Celery's own goes by this machine's clock: once that is set back by hours, it would send
    nothing for as long."""

    def tick(self, *arguments: Any, **named: Any) -> float:
        heap: list[tuple[float, int, Any]] | None = self._heap
        if heap:
            due, _, entry = heap[0]
            if due - self._when(entry, 0) > settings().tick + 1:
                log.warning("beat.clock_set_back")
                for each in self.schedule.values():
                    each.last_run_at = each.default_now() - timedelta(seconds=settings().tick)
                self._heap: Any = None  # is made anew
        return float(super().tick(*arguments, **named))


class Beat(threading.Thread):
    """Celery beat, for as long as its process lives."""

    def __init__(self) -> None:
        super().__init__(name="beat", daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        app.set_current()
        scheduler = Steady(app, max_interval=settings().tick)
        pause = 0.0
        while not self._stopped.wait(pause):
            try:
                pause = max(0.0, scheduler.tick())
            except Exception:
                log.exception("beat.failed")
                pause = AGAIN_S


beat = Beat()


@worker_ready.connect
def _on_ready(**_: Any) -> None:
    liveness.start()
    beat.start()


@worker_shutting_down.connect
def _on_shutting_down(**_: Any) -> None:
    beat.stop()


@setup_logging.connect
def _logging(**_: Any) -> None:
    logs.configure()
