"""The three services' workers without disks: `celery -A bench.faked_disks:imager worker`.

Faked are the copies alone: each is a short wait. Celery, the queues, the engine of operations
with its journal and the host's report are what every worker has. Each execution is written down
outside of the database: two lines of `executions` in the vault, in the order of what happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from celery import Celery

from shared import commands
from shared.entry import receive
from shared.operations.context import Context, Outcome
from shared.operations.journal import action
from shared.operations.runner import handles
from shared.settings import settings
from shared.worker import service_app

COPY_S = 0.01
"""About what the copy of a running server takes by reflink."""


def _write_down(what: str, context: Context) -> None:
    """Whole lines: a write to a file opened with O_APPEND is one step (open(2))."""
    line = f"{what} {context.operation.server_id} {context.id}\n"
    file = os.open(settings().vault / "executions", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(file, line.encode())
    os.close(file)


@action
def undo_nothing() -> None:
    """There is nothing in the world to undo."""


def _pretend(context: Context, command: commands.Command) -> Outcome:
    _write_down("began", context)
    context.phase("copying")
    context.undo("undo_nothing")
    time.sleep(COPY_S)
    _write_down("ended", context)
    return Outcome({})


def _entry(command: type[commands.Command]) -> Callable[..., None]:
    def enter(self: Any, operation_id: str | None = None, **fields: Any) -> None:
        receive(self, command, operation_id, fields)

    return enter


def _app(service: str) -> Celery:
    app = service_app(service, tasks=__name__)
    for command in commands.BY_KIND.values():
        if command.service == service:
            handles(command)(_pretend)
            app.task(name=command.task, bind=True)(_entry(command))
    return app


snapshotter, imager, cloner = (_app(service) for service in commands.SERVICES)
