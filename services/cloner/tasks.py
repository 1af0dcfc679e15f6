"""Queue entry point of the cloner: `clones.<host>`."""

from typing import Any

from services.cloner import clones, farms, removal  # noqa: F401  registers the handlers
from shared import commands
from shared.entry import receive
from shared.worker import service_app

app = service_app("cloner")


@app.task(name="cloner.clone", bind=True)
def clone(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.CreateClones, operation_id, fields)


@app.task(name="cloner.delete_clone", bind=True)
def delete_clone(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.DeleteClone, operation_id, fields)


@app.task(name="cloner.start", bind=True)
def start(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.StartFarm, operation_id, fields)


@app.task(name="cloner.stop", bind=True)
def stop(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.StopFarm, operation_id, fields)


@app.task(name="cloner.retry", bind=True)
def retry(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.RetryFarm, operation_id, fields)


@app.task(name="cloner.delete", bind=True)
def delete(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.DeleteFarm, operation_id, fields)
