"""Broker, database, clock and network fail under real operations on the composed stack.

After each fault every operation that was asked for has ended, did its work once and says what is
true (`Work.check`): none is lost, none is doubled. One host is cut off from the centre for five
minutes; the other faults strike meanwhile, so that the whole takes hardly longer than that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from compose import strikes
from compose.work import PROMPT, Work, health, query, until, wait_health

from lab import filesystems
from lab.composed import Deployment, deployed
from lab.containers import Engine

MIB = 2**20
WORKERS = ("demo-snapshotter", "demo-imager")
CUT_OFF = ("other-snapshotter", "other-imager")
CUT = float(os.environ.get("TRIPTYCH_TEST_CUT", "300"))
"""Seconds that the second host is cut off."""
SECOND_VM = (
    "from lab import demo_host as d; from lab.guest import Guest; from lab.libvirtd import "
    "Hypervisor; home = Hypervisor(d.DATA / 'libvirt', 'qemu:///system'); "
    "Guest.create(home, d.DATA / 'vms', 'second', nic=True).start(wait=False)"
)
SILENCE = 50.0
"""Seconds that a silence lasts: as long as Docker takes to notice, where it asks at the shipped
pace."""
PLACE, WORD = "/root/fault", "still here\n"


@dataclass
class Site:
    """The deployment with two hosts, one server on each; PostgreSQL's data is on `disk`."""

    deployment: Deployment
    disk: Path

    def work(self, server: str = "demo", vault: str = "vault") -> Work:
        guest = self.deployment.guest(server).wait_ready()
        guest.write(PLACE, WORD)
        return Work(self.deployment, server, self.deployment.volume("demo-data") / vault)

    def busy(self) -> Work:
        """Copies of the demo's server, one at work and others in the line behind it."""
        work = self.work()
        for ask in (work.snapshot, work.image, work.snapshot, work.image):
            ask()
        work.wait_running()
        return work

    def check(self, work: Work, fault: str, *workers: str) -> None:
        """Everything that was asked for is done, once, and all is well again."""
        work.ask_again()
        print(f"\n{fault}: {work.check()}")
        assert work.slowest < PROMPT
        for service in ("postgres", "redis", "api", "beat", *(workers or WORKERS)):
            wait_health(self.deployment, service, "healthy")
        guest = self.deployment.guest(work.server)
        assert guest.state() == "running"
        assert guest.read(PLACE) == WORD


@dataclass
class Cut:
    """The second host is off since `began` (monotonic seconds), in the middle of `work`."""

    work: Work
    began: float
    healed: ExitStack


@pytest.fixture(scope="module")
def site(engine: Engine, state: Path) -> Iterator[Site]:
    library = state / "clock"
    library.mkdir()
    strikes.build_clock(library)
    with filesystems.ext4(400 * MIB) as disk:
        database = disk / "data"
        database.mkdir(mode=0o700, exist_ok=True)
        deployment = Deployment(
            engine,
            state / "faults",
            "triptych-faults",
            files=("docker-compose.yml", "tests/compose/faults.yml"),
            settings={"FAULTS_DATABASE": str(database), "FAULTS_LIBRARY": str(library)},
        )
        engine.ensure("postgres:17")
        user = ("run", "--rm", "--entrypoint", "id", "postgres:17")
        uid, gid = (int(engine.docker(*user, way, "postgres")) for way in ("-u", "-g"))
        os.chown(database, uid, gid)
        with deployed(deployment, "api", "beat", *WORKERS, *CUT_OFF):
            deployment.execute("hypervisor", "python3", "-c", SECOND_VM)
            deployment.client.servers.add("demo", "demo")
            until(lambda: _sees(deployment, "kvm-2", "second"), 60, "the host sees its VM")
            deployment.client.servers.add("kvm-2", "second")
            yield Site(deployment, disk)


def _sees(deployment: Deployment, host: str, domain: str) -> bool:
    return domain in [each["name"] for each in deployment.client.domains.list(host)]


@pytest.fixture(scope="module", autouse=True)
def cut(site: Site) -> Iterator[Cut]:
    """From the first test to the last, the second host reaches neither database nor broker."""
    work = site.work("second", "vault-2")
    for ask in (work.image, work.snapshot, work.image):
        ask()
    work.wait_running()
    with ExitStack() as healed:
        healed.enter_context(strikes.silenced(site.deployment, *CUT_OFF))
        yield Cut(work, time.monotonic(), healed)


def test_redis_paused(site: Site) -> None:
    """A Redis that is there and does nothing holds nobody up; what was asked meanwhile is done."""
    work = site.busy()
    with strikes.paused(site.deployment, "redis"), strikes.lasting(SILENCE):
        work.image()
        work.snapshot()
        readiness = work.get("/readyz")
        said = wait_health(site.deployment, "demo-imager", "unhealthy")
        verdict, _ = health(site.deployment, "api")

    assert (readiness.status_code, readiness.json()["status"]) == (200, "degraded")
    assert verdict == "healthy"
    assert "database: ok" in said
    assert "broker: Timeout" in said
    site.check(work, "Redis paused")


def test_packets_to_redis_dropped(site: Site) -> None:
    """Connections that fell silent are given up, and workers listen again after that."""
    work = site.busy()
    with strikes.silenced(site.deployment, "redis"), strikes.lasting(SILENCE):
        work.image()
        work.snapshot()
        wait_health(site.deployment, "demo-imager", "unhealthy")
    healed = time.monotonic()
    work.ask_again()
    work.wait_ended()
    print(f"\nall done {time.monotonic() - healed:.0f} s after the packets went through again")
    site.check(work, "packets to Redis dropped")


def test_redis_flushed(site: Site) -> None:
    """Wake-ups that were lost come again; queues and their bindings are made anew."""
    deployment = site.deployment
    work = site.busy()
    _redis(deployment, "flushall")
    work.image()
    work.wait_ended()
    with strikes.paused(deployment, "demo-imager"):
        time.sleep(3)  # what it asks of Redis, a second at most, would take the message away
        work.image()
        until(lambda: _redis(deployment, "llen", "triptych:images.demo") != "0", 30, "it is sent")
        _redis(deployment, "flushall")
    flushed = time.monotonic()
    work.wait_ended()
    print(f"\nthe lost wake-up came again, and all was done, in {time.monotonic() - flushed:.0f} s")
    site.check(work, "Redis flushed")


def _redis(deployment: Deployment, *command: str) -> str:
    with_password = 'REDISCLI_AUTH="$(cat /run/secrets/redis-password)" exec redis-cli "$@"'
    return deployment.execute("redis", "sh", "-c", with_password, "sh", *command).strip()


def test_postgresql_paused(site: Site) -> None:
    """Requests get their 503 in time, many at once too; workers wait and go on."""
    work = site.busy()
    with strikes.paused(site.deployment, "postgres"), strikes.lasting(SILENCE):
        with ThreadPoolExecutor(24) as pool:  # more than there are connections
            answers = list(pool.map(lambda _: work.get("/v1/servers"), range(24)))
        work.image()
        readiness = work.get("/readyz")
        said = wait_health(site.deployment, "demo-imager", "unhealthy")
        wait_health(site.deployment, "api", "unhealthy")

    assert {(503, "database_unavailable")} == {
        (each.status_code, each.json()["code"]) for each in answers
    }
    assert (readiness.status_code, readiness.json()["status"]) == (503, "failed")
    assert "database: OperationalError" in said
    assert "broker: ok" in said
    site.check(work, "PostgreSQL paused")


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_postgresql_goes_and_comes_back(site: Site, how: str) -> None:
    """Neither a restart nor SIGKILL costs an operation; at the worst one begins again."""
    work = site.busy()
    if how == "restarted":
        site.deployment.compose("restart", "--no-deps", "postgres")
    else:
        os.kill(site.deployment.inspect("postgres")["State"]["Pid"], signal.SIGKILL)
    work.image()
    work.snapshot()
    site.check(work, f"PostgreSQL {how}")


def test_disk_of_postgresql_full(site: Site) -> None:
    """Without room for its log PostgreSQL falls; with room again all goes on by itself."""
    work = site.busy()
    before = _complaints(site.deployment)
    with strikes.filled(site.disk):
        until(lambda: _complaints(site.deployment) > before, 60, "the full disk stops PostgreSQL")
        work.image()
        work.snapshot()
        work.get("/readyz")  # it may be up again, until the next write: what counts is an answer
    wait_health(site.deployment, "postgres", "healthy", 180)
    site.check(work, "disk of PostgreSQL full")


def _complaints(deployment: Deployment) -> int:
    """Have PostgreSQL begin another file of its log; how often it has run out of space by then."""
    with suppress(subprocess.CalledProcessError):
        query(deployment, "SELECT pg_switch_wal() FROM pg_logical_emit_message(true, 'x', 'x')")
    return deployment.logs("postgres", tail=10_000).count("No space left")


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_clock_of_a_host_wrong(site: Site, seconds: int) -> None:
    """Times are the database's: a snapshot lives as long as it should, whatever its host thinks."""
    deployment = site.deployment
    work = site.busy()
    with strikes.clock_off(deployment, seconds, *WORKERS):
        work.image()
        work.snapshot()
        operations = work.wait_ended()
        snapshot = work.get("/v1/servers/demo/snapshot").json()
        host = work.get("/v1/hosts/demo").json()
        moment = datetime.fromisoformat(query(deployment, "SELECT now()"))
        woken = query(deployment, "SELECT max(woken_at) <= now() FROM operation")
        last_log = deployment.logs("demo-imager", tail=1)

    assert abs(_told(last_log) - moment - timedelta(seconds=seconds)) < timedelta(minutes=5)
    soon = timedelta(seconds=120)
    lives = datetime.fromisoformat(snapshot["expires_at"]) - moment
    assert timedelta(hours=48) - soon < lives <= timedelta(hours=48)
    assert host["answering"]
    assert woken == "t"
    for operation in operations:
        created, started, finished = (
            datetime.fromisoformat(operation[f"{what}_at"])
            for what in ("created", "started", "finished")
        )
        assert created - timedelta(seconds=2) <= started <= finished <= moment
        assert moment - finished < timedelta(minutes=10)
    site.check(work, f"a host's clock {seconds:+} s off")


def _told(log: str) -> datetime:
    """When a worker thinks it wrote this line."""
    return datetime.fromisoformat(json.loads(log[log.index("{") :])["timestamp"])


def test_host_cut_off_for_five_minutes(site: Site, cut: Cut) -> None:
    """What it had begun is undone or finished, by itself alone, and what waited is done then."""
    work = cut.work
    waiting = work.image()
    time.sleep(max(0.0, cut.began + CUT - time.monotonic()))
    said = {service: health(site.deployment, service) for service in CUT_OFF}
    silent = work.get("/v1/hosts/kvm-2").json()
    before = work.get(f"/v1/operations/{waiting.operation}").json()
    cut.healed.close()
    healed = time.monotonic()
    work.ask_again()
    work.wait_ended()
    print(f"\nall done {time.monotonic() - healed:.0f} s after {CUT:.0f} s without the centre")

    assert {"unhealthy"} == {verdict for verdict, _ in said.values()}
    assert all("database: OperationalError" in output for _, output in said.values())
    assert silent["silent"] == (CUT > 90)
    assert before["state"] == "queued"
    site.check(work, "cut off for five minutes", *CUT_OFF)
