"""Queue entry point of the cloner: `clones.<host>`."""

from typing import Any

from services.cloner import clones  # noqa: F401  registers the handler
from shared import commands
from shared.entry import receive
from shared.worker import service_app

app = service_app("cloner")


@app.task(name="cloner.clone", bind=True)
def clone(self: Any, operation_id: str | None = None, **fields: Any) -> None:
    receive(self, commands.CreateClones, operation_id, fields)
