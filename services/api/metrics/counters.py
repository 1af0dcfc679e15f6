"""Counters and histograms: the tallies that ended operations left (shared.operations.tally)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from sqlalchemy import select
from sqlmodel import Session

from shared.commands import BY_KIND
from shared.models import Host, Tally
from shared.operations.tally import BOUNDS, INFINITE, SUM

OF = ("host", "service", "kind")
ENDED = ("succeeded", "failed", "cancelled")


def read(session: Session) -> Iterator[Metric]:
    # By column: a row of the ORM's for each would cost more than all the rest.
    table: Any = Tally.__table__  # type: ignore[attr-defined]
    tallies = list(session.execute(select(*table.columns)))
    hosts = [host.name for host in session.scalars(select(Host))]
    yield _operations(tallies, hosts)
    yield _histogram(
        "duration",
        tallies,
        "triptych_operation_duration_seconds",
        "Time that ended operations took, from the start of their last attempt",
        ("state",),
    )
    yield _histogram(
        "pause",
        tallies,
        "triptych_guest_pause_seconds",
        "How long guests stood still for a copy; those that never stood still do not count",
    )
    copied = CounterMetricFamily(
        "triptych_copied_bytes",
        "Bytes that finished copies went through; with way=reflink they are shared, not written",
        labels=(*OF, "way"),
    )
    for each in tallies:
        if each.measure == "bytes":
            copied.add_metric([each.host, each.service, each.kind, each.label], each.value)
    yield copied


def _operations(tallies: list[Any], hosts: list[str]) -> Metric:
    """Zero where nothing has ended yet: else `increase()` would not see the first failure."""
    ended = {
        (host, command.service, kind, state): 0.0
        for host in hosts
        for kind, command in BY_KIND.items()
        for state in ENDED
    }
    for each in tallies:
        if each.measure == "operations":
            ended[each.host, each.service, each.kind, each.label] = each.value
    family = CounterMetricFamily(
        "triptych_operations", "Operations that have ended", labels=(*OF, "state")
    )
    for labels, value in ended.items():
        family.add_metric(labels, value)
    return family


def _histogram(
    measure: str, tallies: list[Any], name: str, what: str, labels: Sequence[str] = ()
) -> Metric:
    """Cumulative, as Prometheus has them; in the tables each value is in one bucket."""
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for each in tallies:
        if each.measure == measure:
            series = (each.host, each.service, each.kind, each.label)[: len(OF) + len(labels)]
            found[series][each.bucket] = each.value
    bounds = {*map(str, BOUNDS[measure]), INFINITE}
    family = HistogramMetricFamily(name, what, labels=(*OF, *labels))
    for series, values in found.items():
        total = values.pop(SUM, 0.0)
        hits = dict.fromkeys(bounds, 0.0) | values
        below, cumulative = 0.0, []
        for bound in sorted(hits, key=float):
            below += hits[bound]
            cumulative.append((bound, below))
        family.add_metric(series, cumulative, total)
    return family
