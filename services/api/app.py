"""The HTTP API: thin. A request becomes a row; the work is the services' (docs/reference).

`python -m services.api`, or `uvicorn --factory services.api.app:create_app`.
"""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from services.api import (
    auth,
    clones,
    events,
    farms,
    health,
    hosts,
    images,
    metrics,
    operations,
    problems,
    schedules,
    servers,
    snapshots,
)
from shared import VERSION, logs
from shared.database import engine, migrate
from shared.operations.outbox import Relay

NOUNS = (hosts, servers, snapshots, images, clones, farms, schedules, operations, events)

DESCRIPTION = """\
Snapshots, images and clones of libvirt/QEMU virtual machines.

Long work answers `202` with an operation and its address in `Location`; follow it with
`GET /v1/operations/{operation}?wait=30`. Refusals are RFC 9457 problems with a stable `code`.
Lists are paged: send the `next` of a page as `after`, until it is null.
"""


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    logs.configure()
    if engine().dialect.name == "sqlite":
        await run_in_threadpool(migrate)
    relay: Relay = app.state.relay
    relay.start()
    yield
    relay.stop()
    await run_in_threadpool(relay.join, 5)


def create_app() -> FastAPI:
    """The application. Raises SystemExit with a sentence when no token is configured."""
    token = auth.configured_token()
    app = FastAPI(
        title="Triptych",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=_lifespan,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.relay = Relay()
    app.state.stopping = threading.Event()
    app.add_middleware(auth.Gate, token=token)
    problems.install(app)
    v1 = APIRouter(prefix="/v1", dependencies=[Security(auth.bearer)])
    for noun in NOUNS:
        v1.include_router(noun.router)
    app.include_router(v1)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _operation_id(route: APIRoute) -> str:
    """`images_restore`: the noun and the function, for those who generate clients."""
    return f"{route.tags[0]}_{route.name}"


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the problem's schema, which every refusal refers to."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        schemas = made["components"]["schemas"]
        problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema
