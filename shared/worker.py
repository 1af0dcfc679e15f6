"""What each of the three services' workers is beside its tasks: an app on this host's queue,
log context, the host's inventory, clearing up after a predecessor that died, and looking after
the copies that it owns.
"""

from typing import Any, Literal

import structlog
from celery import Celery, current_app
from celery.signals import (
    setup_logging,
    task_postrun,
    task_prerun,
    worker_init,
    worker_process_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)

from shared import liveness, logs, recovery  # noqa: F401  registers the journal's actions
from shared.celery_app import make_app
from shared.commands import queue_of
from shared.copying import HOLDS
from shared.hosts import HostReporter
from shared.hypervisor.watchdog_helper import thaw_owed
from shared.operations.bystander import Bystander
from shared.operations.outbox import flush_if_possible
from shared.operations.reconcile import adopt_orphans
from shared.settings import settings
from shared.tending.digester import Digester
from shared.tending.measurer import Measurer
from shared.tending.tender import Tender

Owned = Literal["snapshot", "image"]
TENDER_PATIENCE = 5.0
"""Seconds that the end of a worker waits for what it does in the background."""
_tenders: list[Tender] = []


def service_app(service: str, tasks: str | None = None, owns: Owned | None = None) -> Celery:
    """The app of one of the three services on this host; reads `<queue>.<host>`.

    `tasks` names the module that holds them, if that is not the service's own; `owns` the kind of
    copies in the vault that it looks after in the background.
    """
    module = tasks or f"services.{service}.tasks"
    app = make_app(service, [queue_of(service, settings().host)], [module])
    app.conf.triptych_service = service
    app.conf.triptych_owns = owns
    liveness.install(app)
    return app


@worker_init.connect
def _on_worker_init(**_: Any) -> None:
    """Before the broker is there: to give a guest back needs none."""
    Bystander().start()
    thaw_owed(settings().libvirt_uri, settings().vault / HOLDS)


@worker_ready.connect
def _on_worker_ready(sender: Any, **_: Any) -> None:
    HostReporter().start()
    liveness.start()
    if owns := sender.app.conf.triptych_owns:
        _tenders.extend((Measurer(owns), Digester(owns)))
    for tender in _tenders:
        tender.start()
    _clear_up(sender.app)


@worker_shutting_down.connect
def _on_shutting_down(**_: Any) -> None:
    for tender in _tenders:
        tender.stop()


@worker_shutdown.connect
def _on_shutdown(**_: Any) -> None:
    for tender in _tenders:
        tender.stop()
        tender.join(TENDER_PATIENCE)


@worker_process_init.connect
def _on_child_start(**_: Any) -> None:
    """A child that was killed is replaced by a new one, which sees to what was left."""
    _clear_up(current_app)


def _clear_up(app: Celery) -> None:
    adopt_orphans(app.conf.triptych_service)
    flush_if_possible()


@setup_logging.connect
def _logging(**_: Any) -> None:
    logs.configure()


@task_prerun.connect
def _bind(task_id: str, task: Any, **_: Any) -> None:
    structlog.contextvars.bind_contextvars(task=task.name, task_id=task_id)


@task_postrun.connect
def _unbind(**_: Any) -> None:
    structlog.contextvars.clear_contextvars()
