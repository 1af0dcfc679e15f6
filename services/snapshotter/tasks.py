"""Queue entry points of the snapshotter: `snapshots.<host>`."""

from typing import Any

from services.snapshotter import snapshots  # noqa: F401  registers the handlers
from shared import commands
from shared.entry import receive
from shared.worker import service_app

app = service_app("snapshotter", owns="snapshot")


@app.task(name="snapshotter.take", bind=True)
def take(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.TakeSnapshot, operation_id, fields)


@app.task(name="snapshotter.revert", bind=True)
def revert(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.RevertSnapshot, operation_id, fields)


@app.task(name="snapshotter.delete", bind=True)
def delete(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.DeleteSnapshot, operation_id, fields)


@app.task(name="snapshotter.undo", bind=True)
def undo(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.UndoRevert, operation_id, fields)


@app.task(name="snapshotter.forget", bind=True)
def forget(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.ForgetRevert, operation_id, fields)
