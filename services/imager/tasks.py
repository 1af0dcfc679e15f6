"""Queue entry points of the imager: `images.<host>`."""

from typing import Any

from services.imager import images, verification  # noqa: F401  registers the handlers
from shared import commands
from shared.entry import receive
from shared.worker import service_app

app = service_app("imager", owns="image")


@app.task(name="imager.create", bind=True)
def create(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.CreateImage, operation_id, fields)


@app.task(name="imager.restore", bind=True)
def restore(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.RestoreImage, operation_id, fields)


@app.task(name="imager.delete", bind=True)
def delete(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.DeleteImage, operation_id, fields)


@app.task(name="imager.verify", bind=True)
def verify(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.VerifyImage, operation_id, fields)


@app.task(name="imager.promote", bind=True)
def promote(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.PromoteSnapshot, operation_id, fields)


@app.task(name="imager.undo", bind=True)
def undo(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.UndoRestore, operation_id, fields)


@app.task(name="imager.forget", bind=True)
def forget(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.ForgetRestore, operation_id, fields)
