"""A second host, with a hypervisor and three workers of its own, against the same centre."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from compose_tools import wait_for
from triptych import Problem

from embedded.stack import ROOT
from lab.composed import Deployment
from lab.containers import Engine
from lab.libvirtd import scratch

WORKERS = ("snapshotter", "imager", "cloner")


@pytest.fixture(scope="module")
def address(engine: Engine) -> str:
    """Where containers of every network reach this machine."""
    (bridge,) = json.loads(engine.docker("network", "inspect", "bridge"))
    return str(bridge["IPAM"]["Config"][0]["Gateway"])


@pytest.fixture(scope="module")
def second(engine: Engine, deployment: Deployment, address: str) -> Iterator[Deployment]:
    """Host kvm-2, added as docs/how-to/add-a-host.md says."""
    opened = replace(
        deployment,
        files=(*deployment.files, "docker-compose.centre.yml"),
        settings={**deployment.settings, "TRIPTYCH_CENTRE_BIND": address},
    )
    opened.up("postgres", "redis")
    with scratch() as state:
        host = Deployment(
            engine,
            state,
            f"{deployment.project}-kvm-2",
            profiles=(),
            files=("docker-compose.host.yml", "tests/compose/second_host.yml"),
            settings={
                "TRIPTYCH_HOST": "kvm-2",
                "TRIPTYCH_CENTRE": address,
                "TRIPTYCH_SECRETS": str(deployment.secrets),
                "TRIPTYCH_LIBVIRT_URI": "qemu:///system",
            },
        )
        try:
            host.up()
            yield host
        finally:
            host.down()
            deployment.up("postgres", "redis")


@pytest.fixture(scope="module")
def server(deployment: Deployment, second: Deployment) -> Iterator[str]:
    """The second host's VM, whose name is that of the first one's."""
    client = deployment.client
    wait_for(lambda: _domains(deployment, "kvm-2"), "the second host's domains are reported")
    added = str(client.servers.add("kvm-2", "demo")["id"])
    yield added
    client.wait(client.snapshots.delete(added)["id"], timeout=180)
    client.servers.forget(added)


def _domains(deployment: Deployment, host: str) -> list[str]:
    try:
        return [each["name"] for each in deployment.client.domains.list(host)]
    except Problem:
        return []


def _first(deployment: Deployment) -> str:
    """The first host's server of the same name."""
    (found,) = [each["id"] for each in deployment.client.servers.list() if each["host"] == "demo"]
    return str(found)


def _snapshots(host: Deployment, service: str) -> set[str]:
    """The servers that this host's vault has snapshots of."""
    listed = host.execute(service, "sh", "-c", "ls /srv/triptych-demo/vault/snapshots")
    return set(listed.split())


def test_work_reaches_its_own_host_only(
    deployment: Deployment, second: Deployment, server: str
) -> None:
    """Each host copies its own server into its own vault, also where names are the same."""
    first = _first(deployment)
    taken = [deployment.client.snapshots.take(each, replace=True) for each in (first, server)]
    ended = [deployment.client.wait(each["id"], check=True, timeout=180) for each in taken]

    assert [each["host"] for each in ended] == ["demo", "kvm-2"]
    assert _snapshots(second, "snapshotter") == {server}
    assert server not in _snapshots(deployment, "demo-snapshotter")


def test_draining_is_one_command(deployment: Deployment, second: Deployment, server: str) -> None:
    """While a host drains, work for it is refused with a reason; other hosts go on."""
    drained = deployment.cli("host", "drain", "kvm-2")
    with pytest.raises(Problem) as refused:
        deployment.client.snapshots.take(server, replace=True)
    elsewhere = deployment.client.snapshots.take(_first(deployment), replace=True)
    deployment.client.wait(elsewhere["id"], check=True, timeout=180)
    deployment.cli("host", "resume", "kvm-2")
    again = deployment.client.snapshots.take(server, replace=True)

    assert drained["draining"]
    assert refused.value.code == "host_draining"
    assert deployment.client.wait(again["id"], timeout=180)["state"] == "succeeded"


def test_work_for_a_dead_host_waits_and_says_why(
    deployment: Deployment, second: Deployment, server: str
) -> None:
    """It is accepted, waits with the reason, and is done once when the host is back."""
    second.compose("kill", *WORKERS)
    waiting = deployment.client.snapshots.take(server, replace=True)

    def row() -> dict[str, Any]:
        return dict(deployment.client.operations.get(waiting["id"]))

    reason = wait_for(lambda: row()["waiting"], "the reason is shown", timeout=300)
    silent = row()
    second.up()
    ended = deployment.client.wait(waiting["id"], timeout=300)

    assert "kvm-2" in reason
    assert silent["state"] == "queued"
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)


def test_the_how_to_has_the_commands_of_this_module() -> None:
    """Who follows docs/how-to/add-a-host.md runs the files that the fixtures run."""
    how_to = (ROOT / "docs/how-to/add-a-host.md").read_text()

    assert "-f docker-compose.yml -f docker-compose.centre.yml up --wait" in how_to
    assert "\nCOMPOSE_FILE=docker-compose.host.yml\n" in how_to
    assert "\ndocker compose up --wait\n" in how_to
