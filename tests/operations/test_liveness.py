"""What a worker says of itself, and what a container's health check makes of that."""

import math
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from operations.spine import Broker, World

from shared import database, liveness
from shared.liveness import PATIENCE, Pulse, report
from shared.settings import settings

SCRIPT = Path(__file__).parents[2] / "services" / "healthy"


@pytest.fixture(autouse=True)
def _turning_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer whose loop has just turned, and no checks of another process."""
    monkeypatch.setattr(Pulse, "last", math.inf)  # until the servers are there minutes may pass
    for other in liveness.CHECKS.keys() - {"database", "broker", "consumer"}:
        monkeypatch.delitem(liveness.CHECKS, other)


def test_all_is_well(world: World, any_database: str, redis_broker: Broker) -> None:
    """The first line is the verdict, then comes each thing that was looked at."""
    assert report().splitlines() == ["ok", "database: ok", "broker: ok", "consumer: ok"]


def test_a_broker_that_is_away_is_named(world: World) -> None:
    """One thing that fails makes the whole fail, and says why."""
    verdict, data, broker, consumer = report().splitlines()
    assert (verdict, data, consumer) == ("failed", "database: ok", "consumer: ok")
    assert "broker: ConnectionError" in broker


def test_a_database_that_is_away_is_named(
    world: World, redis_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is written all the same, and never shows a password."""
    database.engine().dispose()
    database.engine.cache_clear()
    settings.cache_clear()
    monkeypatch.setenv("TRIPTYCH_DATABASE_URL", "postgresql+psycopg://me:hush@127.0.0.1:1/none")
    said = report()
    verdict, data, broker, _ = said.splitlines()
    assert (verdict, broker) == ("failed", "broker: ok")
    assert "database: OperationalError" in data
    assert "hush" not in said


def test_a_stuck_consumer_is_named(
    world: World, redis_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that has not turned for longer than the patience counts as failed."""
    monkeypatch.setattr(Pulse, "last", time.monotonic() - PATIENCE - 5)
    assert report().splitlines()[0] == "failed"
    assert re.search(r"consumer: TimeoutError: its loop has not turned for [3-9]\d s", report())


def test_a_reason_of_many_lines_is_one_line(
    world: World, redis_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of a report is one dependency's, whatever an error says."""

    def fails() -> None:
        raise RuntimeError("first\nok\nthird")

    monkeypatch.setitem(liveness.CHECKS, "ticks", fails)
    assert report().splitlines()[-1] == "ticks: RuntimeError: first"


def healthy(path: Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(SCRIPT)],
        env={**os.environ, "TRIPTYCH_LIVENESS_FILE": str(path)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_healthy_with_a_fresh_good_report(tmp_path: Path) -> None:
    """Exit 0; what the worker said is printed, for `docker inspect`."""
    path = tmp_path / "alive"
    path.write_text("ok\ndatabase: ok\n")
    assert healthy(path) == (0, "ok\ndatabase: ok\n")


def test_unhealthy_with_a_fresh_bad_report(tmp_path: Path) -> None:
    """Exit 1, with the reason."""
    path = tmp_path / "alive"
    path.write_text("failed\ndatabase: ok\nbroker: ConnectionError: refused\n")
    code, said = healthy(path)
    assert (code, "broker: ConnectionError" in said) == (1, True)


def test_unhealthy_with_a_stale_report(tmp_path: Path) -> None:
    """A worker that has stopped writing hangs, however good its last word was."""
    path = tmp_path / "alive"
    path.write_text("ok\n")
    old = time.time() - 31
    os.utime(path, (old, old))
    code, said = healthy(path)
    assert (code, "hangs" in said) == (1, True)


def test_unhealthy_without_a_report(tmp_path: Path) -> None:
    """A worker that has not come up yet says so by silence."""
    assert healthy(tmp_path / "alive") == (1, "starting: no report yet\n")
