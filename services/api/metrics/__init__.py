"""`GET /metrics`: what the tables say, for Prometheus. Needs the token like all of /v1.

Read anew at each scrape, by a number of queries that does not depend on how much there is.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response, Security
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from services.api import auth, examples
from services.api.metrics import counters, gauges
from services.api.problems import refusals
from shared.database import reading

SHOWN: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"example": examples.METRICS}}}
}
router = APIRouter(tags=["metrics"], dependencies=[Security(auth.bearer)])


class Tables(Collector):
    def collect(self) -> Iterator[Metric]:
        with reading() as session:
            found = [*gauges.read(session), *counters.read(session)]
        yield from found


REGISTRY = CollectorRegistry(auto_describe=False)
REGISTRY.register(Tables())


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses=SHOWN | refusals(),
)
def scrape() -> Response:
    """Operations, copies, schedules, hosts and queues, in Prometheus' text format."""
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
