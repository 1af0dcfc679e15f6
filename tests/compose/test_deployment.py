"""What the composed stack is made of: small images, few powers, no way in, honest health."""

from __future__ import annotations

import httpx
import pytest
from compose_tools import wait_for

from lab.composed import TAG, Deployment

MB = 1000 * 1000
CENTRE = ("postgres", "redis", "api", "beat")
WORKERS = ("demo-snapshotter", "demo-imager", "demo-cloner")


@pytest.mark.parametrize(
    ("image", "limit"), [("api", 180), ("snapshotter", 380), ("imager", 380), ("cloner", 380)]
)
def test_images_are_small(deployment: Deployment, image: str, limit: int) -> None:
    """What an image adds to its base is at most that many megabytes."""
    base = deployment.engine.size("debian:trixie-slim")
    added = deployment.engine.size(f"triptych/{image}:{TAG}") - base

    assert added <= limit * MB, f"{added / MB:.0f} MB"


@pytest.mark.parametrize("service", [*CENTRE, *WORKERS])
def test_containers_have_few_powers(deployment: Deployment, service: str) -> None:
    """Read-only root, no new privileges, no capabilities but those that files need."""
    found = deployment.inspect(service)
    host, powers = found["HostConfig"], {"CHOWN", "DAC_OVERRIDE", "FOWNER"}

    assert host["ReadonlyRootfs"]
    assert not host["Privileged"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert set(host["CapAdd"] or []) == (powers if service in WORKERS else set())
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["Memory"] > 0
    if service in CENTRE:
        assert deployment.execute(service, "id", "-u").strip() != "0"


@pytest.mark.parametrize("service", ["api", "beat", *WORKERS])
def test_no_secret_is_in_the_environment(deployment: Deployment, service: str) -> None:
    """Secrets are files; neither variables nor the command line show them to `docker inspect`."""
    shown = str(deployment.inspect(service))

    for secret in deployment.secrets.iterdir():
        assert secret.read_text() not in shown


def test_a_container_sees_the_secrets_it_needs_alone(deployment: Deployment) -> None:
    """The API's token is not in the workers' containers."""
    assert {"postgres-password", "redis-password", "token"} == _secrets(deployment, "api")
    assert {"postgres-password", "redis-password"} == _secrets(deployment, "demo-imager")


def _secrets(deployment: Deployment, service: str) -> set[str]:
    return set(deployment.execute(service, "ls", "/run/secrets").split())


def test_no_token_no_access(deployment: Deployment) -> None:
    """From outside the API answers health to all, and the rest to those with the token."""
    url = deployment.client.url

    assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200
    assert httpx.get(f"{url}/v1/servers", timeout=30).status_code == 401


def test_database_and_broker_are_not_to_be_reached_from_outside(deployment: Deployment) -> None:
    """Only the API has a port on the machine, and only on loopback."""
    for service in ("postgres", "redis"):
        assert not deployment.inspect(service)["HostConfig"]["PortBindings"]
    (bound,) = deployment.inspect("api")["HostConfig"]["PortBindings"].values()
    assert [each["HostIp"] for each in bound] == ["127.0.0.1"]


@pytest.mark.parametrize("service", ["beat", *WORKERS])
def test_health_names_what_a_worker_depends_on(deployment: Deployment, service: str) -> None:
    """`docker inspect` shows each dependency with how it is."""
    expected = ["ok", "database: ok", "broker: ok", "consumer: ok"]
    expected += ["ticks: ok"] if service == "beat" else []

    def said() -> list[str]:
        return deployment.inspect(service)["State"]["Health"]["Log"][-1]["Output"].splitlines()

    wait_for(lambda: said() == expected, f"{service} says {expected}")


def test_a_host_without_libvirt_is_healthy_and_says_so(deployment: Deployment) -> None:
    """The machine's own three workers come up where no libvirt is; the host's row tells why."""
    own = ("snapshotter", "imager", "cloner")
    try:
        deployment.up(*own)
        rows = wait_for(
            lambda: [each for each in deployment.cli("host", "list")["items"] if each["problem"]],
            "a host has a problem",
        )
    finally:
        deployment.compose("rm", "--stop", "--force", *own)

    assert [(row["name"], row["answering"]) for row in rows] == [("local", False)]
    assert "libvirt" in rows[0]["problem"]
