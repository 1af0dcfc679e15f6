"""Celery beat and the worker of its ticks, in one process: `celery -A shared.beat worker --beat`.

Ticks only read and write the database, so they never wait behind a long copy. Two beats
by accident do no harm: each tick claims what is due in the database.
"""

import time
from typing import Any

from celery.signals import setup_logging, task_success, worker_ready

from shared import liveness, logs
from shared.celery_app import TICKS, make_app
from shared.settings import settings

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
app.conf.beat_scheduler = "celery.beat:Scheduler"
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


@worker_ready.connect
def _on_ready(**_: Any) -> None:
    liveness.start()


@setup_logging.connect
def _logging(**_: Any) -> None:
    logs.configure()
