"""The profiles beside the deployment itself: observe and debug."""

from __future__ import annotations

from typing import Any

import httpx
from compose_tools import wait_for

from lab.composed import Deployment
from lab.containers import Engine


def port(deployment: Deployment, service: str) -> int:
    (bound,) = deployment.inspect(service)["NetworkSettings"]["Ports"].values()
    return int(bound[0]["HostPort"])


def told(url: str, **asked: Any) -> Any:
    """The JSON that is answered there; None while it is coming up."""
    try:
        answer = httpx.get(url, timeout=30, **asked)
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


def test_prometheus_scrapes_the_api_and_evaluates_the_rules(
    engine: Engine, deployment: Deployment
) -> None:
    """With the profile `observe` the target is up, and the alert rules pass their own tests."""
    engine.ensure("prom/prometheus:v3.5.0")
    observed = deployment.with_profiles("observe")
    observed.up("prometheus")
    url = f"http://127.0.0.1:{port(observed, 'prometheus')}/api/v1"

    def health() -> list[str]:
        found = told(f"{url}/targets")
        return [each["health"] for each in found["data"]["activeTargets"]] if found else []

    def up() -> list[str]:
        found = told(f"{url}/query", params={"query": 'triptych_host_up{host="demo"}'})
        return [each["value"][1] for each in found["data"]["result"]] if found else []

    wait_for(lambda: health() == ["up"], "the target is up")
    values = wait_for(up, "what it has is stored")
    folder = "/etc/prometheus"
    checked = observed.execute("prometheus", "promtool", "check", "rules", f"{folder}/alerts.yml")
    tested = observed.execute(
        "prometheus", "promtool", "test", "rules", f"{folder}/alerts.test.yml"
    )
    observed.compose("rm", "--stop", "--force", "prometheus")

    assert values == ["1"]
    assert "SUCCESS" in checked
    assert "SUCCESS" in tested


def test_flower_shows_the_workers_to_those_with_the_password(deployment: Deployment) -> None:
    """With the profile `debug` Flower knows every worker, and lets nobody in without a password."""
    debugged = deployment.with_profiles("debug")
    debugged.compose("build", "--quiet", "flower")
    debugged.up("flower")
    url = f"http://127.0.0.1:{port(debugged, 'flower')}/api/workers"
    password = (deployment.secrets / "consoles-password").read_text()

    def workers() -> int:
        return len(told(url, params={"refresh": 1}, auth=("triptych", password)) or ())

    wait_for(lambda: workers() >= 4, "three workers and beat")
    refused = httpx.get(url, timeout=30).status_code
    debugged.compose("rm", "--stop", "--force", "flower")

    assert refused == 401
