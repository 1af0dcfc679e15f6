"""What stands on the metrics: alert rules, dashboard and reference name no metric and no label
that `GET /metrics` does not have."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_world import World
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from shared.database import now, transaction
from shared.models import Event, OutboxMessage, Schedule, ScheduleRun, Server
from shared.operations.finish import finish

ROOT = Path(__file__).resolve().parents[2]
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/triptych.json").read_text())
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}
PROMETHEUS_OWN = {"up": {"job", "instance"}}


@pytest.fixture
def exposed(api: TestClient, world: World, server: Server) -> dict[str, set[str]]:
    """Label names by metric, of a world in which there is something of everything."""
    world.host("kvm-2", facts={"free_bytes": 1, "total_bytes": 2})
    world.image(server, verified_result="passed")
    world.snapshot(server)
    world.operation(server)
    work = world.operation(
        server, started_at=now(), bytes_done=1, result={"way": "reflink", "pause_ms": 10}
    )
    with transaction() as session:
        finish(session, session.merge(work), "succeeded")
    slot = now() - timedelta(hours=1)
    plan = {"at": "03:00", "timezone": "UTC", "keep": 1, "catch_up_s": 60, "start_at": now()}
    daily = world.add(Schedule(server_id=server.id, kind="daily", **plan))
    ran = {"schedule_id": daily.id, "state": "succeeded", "operation_id": work.id}
    world.add(ScheduleRun(slot=slot, **ran))
    world.add(OutboxMessage(task="t", queue="q"))
    world.add(Event(type="triptych.a"))
    labels: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(api.get("/metrics").text):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return labels | PROMETHEUS_OWN


def metrics_of(expression: str) -> dict[str, set[str]]:
    """The metrics of a PromQL expression, each with the labels in its selectors."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, selector in re.findall(r"\b(triptych_\w+|up)\b(?:\{([^}]*)\})?", expression):
        found[name] |= set(re.findall(r"(\w+)\s*[=!]", selector))
    return found


def grouped_by(expression: str) -> set[str]:
    """The labels in its `by (…)` and `on (…)`."""
    lists = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    return {label for each in lists for label in re.findall(r"\w+", each)}


def panels() -> Iterator[dict[str, Any]]:
    yield from (each for each in DASHBOARD["panels"] if each["type"] != "row")


def expressions() -> Iterator[tuple[str, str, str]]:
    """Where, PromQL, and the texts that show its labels."""
    for name, rule in RULES.items():
        yield name, rule["expr"], json.dumps(rule["annotations"])
    for panel in panels():
        for target in panel["targets"]:
            shown = target.get("legendFormat", "")
            yield panel["title"], target["expr"], re.sub(r"\{\{(\w+)\}\}", r"$labels.\1 ", shown)


def test_metrics_and_labels_exist(exposed: dict[str, set[str]]) -> None:
    """In selectors, in groupings, and in the texts that are made of them."""
    for where, expression, shown in expressions():
        used = metrics_of(expression)
        assert used, where
        assert set() == set(used) - set(exposed), where
        for metric, labels in used.items():
            assert labels <= exposed[metric], (where, metric)
        there = set().union(*(exposed[each] for each in used))
        assert grouped_by(expression) <= there, where
        assert set(re.findall(r"\$labels\.(\w+)", shown)) <= there, where


def test_alerts_are_whole() -> None:
    """Each says what happened, what to do, and how bad it is; each is tried by promtool, fires
    in one case and stays silent in another."""
    tests = yaml.safe_load((ROOT / "deploy/prometheus/alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for name, rule in RULES.items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert set(rule["annotations"]) == {"summary", "description"}, name
        assert len(rule["annotations"]["description"]) > 80, name
        fires = {bool(each.get("exp_alerts")) for each in cases if each["alertname"] == name}
        assert True in fires, name


def test_guide_explains_every_alert() -> None:
    """docs/how-to/watch-it.md has them all, and no other."""
    guide = (ROOT / "docs/how-to/watch-it.md").read_text()
    assert set(RULES) == set(re.findall(r"\bTriptych[A-Z]\w+", guide))


def test_reference_lists_every_metric(exposed: dict[str, set[str]], api: TestClient) -> None:
    """docs/reference/metrics.md has exactly what is exposed, with its type and its labels."""
    families = {
        each.name + ("_total" if each.type == "counter" else ""): each
        for each in text_string_to_metric_families(api.get("/metrics").text)
    }
    expected = {
        name: (
            each.type,
            {label for sample in each.samples for label in sample.labels} - {"le"},
        )
        for name, each in families.items()
    }
    table = re.findall(
        r"^\| `(triptych_\w+)` \| (\w+) \| ([^|]*)\|",
        (ROOT / "docs/reference/metrics.md").read_text(),
        re.MULTILINE,
    )
    assert expected == {
        name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in table
    }


def test_dashboard_can_be_laid_out() -> None:
    """Panels have ids of their own, stay in the grid and cover no other; the rows are there."""
    ids = [each["id"] for each in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    rows = [each["title"] for each in DASHBOARD["panels"] if each["type"] == "row"]
    assert rows == ["Protection", "Operations", "Hosts and vaults", "Queue"]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
