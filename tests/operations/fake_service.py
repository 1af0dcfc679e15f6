"""The snapshotter's queue with pretended work, for workers that the tests start and kill.

What a snapshot's description says is done: `work`, `slow` (until a file `go` is in the vault),
`die` (the first attempt kills its own process), `fail`.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from shared import commands, worker  # noqa: F401  connects the signals
from shared.celery_app import make_app
from shared.entry import receive
from shared.operations.context import Context, Outcome
from shared.operations.journal import action
from shared.operations.runner import handles
from shared.settings import settings

app = make_app(
    "snapshotter",
    [commands.queue_of("snapshotter", settings().host)],
    ["operations.fake_service"],
)
app.conf.triptych_service = "snapshotter"


def write_down(what: str) -> None:
    with Path(settings().vault / "log").open("a") as log:
        log.write(f"{what}\n")


@action
def fake_undo(step: str) -> None:
    write_down(f"undo {step}")


@handles(commands.TakeSnapshot)
def take(context: Context, command: commands.TakeSnapshot) -> Outcome:
    context.undo("fake_undo", step=f"attempt {context.operation.attempt}")
    write_down(f"run {context.id} {os.getpid()}")
    if command.description == "die" and context.operation.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while command.description == "slow" and not (settings().vault / "go").exists():
        context.check()
        time.sleep(0.05)
    if command.description == "fail":
        raise RuntimeError("as asked")
    return Outcome({"snapshot": "pretended"})


@app.task(name="snapshotter.take", bind=True)
def take_task(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.TakeSnapshot, operation_id, fields)
