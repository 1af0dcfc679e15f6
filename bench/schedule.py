"""The part `schedule`: what beat's tick costs beside 100,000 servers, 150,000 schedules and five
million runs, on PostgreSQL and on SQLite, and what claims cost that eight imagers make at once.

The tick is the one that beat runs, with a real Redis behind it; it is in a process of its own,
whose memory is measured too (`bench.many_schedules`). After each tick it is looked whether every
schedule that was due has one run, one operation and one message.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.book import Book
from bench.figure import Figure
from bench.many_schedules import CLAIMED, DUE, RUNS, SCHEDULES
from bench.result import Result
from embedded.stack import free_port
from lab.containers import Engine, engine

IMAGERS = 8
ROOT = Path(__file__).resolve().parents[1]
BESIDE = f"beside {SCHEDULES:,} schedules and {RUNS:,} runs"


@contextlib.contextmanager
def _served(found: Engine, image: str, port: int, *options: str) -> Iterator[int]:
    """A container of the image, gone afterwards; the port on this machine that leads to it."""
    found.ensure(image)
    here = free_port()
    published = ["--detach", "--rm", "--publish", f"127.0.0.1:{here}:{port}"]
    container = found.docker("run", *published, *options).strip()
    try:
        yield here
    finally:
        found.docker("rm", "--force", "--volumes", container)


def on_postgresql(_site: None, book: Book) -> None:
    given = ["--env", "POSTGRES_PASSWORD=bench", "--shm-size", "256m", "postgres:17"]
    with engine() as found, _served(found, "postgres:17", 5432, *given) as port:
        url = f"postgresql+psycopg://postgres:bench@127.0.0.1:{port}/postgres"
        _measure(found, url, "", book)


def on_sqlite(_site: None, book: Book) -> None:
    with engine() as found, tempfile.TemporaryDirectory(prefix="triptych-bench-") as directory:
        _measure(found, f"sqlite:///{directory}/triptych.db", "_sqlite", book)


def _measure(found: Engine, url: str, suffix: str, book: Book) -> None:
    given = ["redis:8", "redis-server", "--save", "", "--protected-mode", "no", "--bind", "0.0.0.0"]  # noqa: S104
    with _served(found, "redis:8", 6379, *given) as port:
        environment = {
            **{name: value for name, value in os.environ.items() if "TRIPTYCH_" not in name},
            "TRIPTYCH_DATABASE_URL": url,
            "TRIPTYCH_BROKER_URL": f"redis://127.0.0.1:{port}/0",
            "TRIPTYCH_SCHEDULE_SPREAD": "0",
        }
        filled = _told(_child(environment, "fill"))
        ticked = _told(_child(environment, "tick"))
        also = {"fill_s": filled["seconds"]}
        for name, seconds in ticked["seconds"].items():
            _record(book, f"tick_{name}{suffix}", seconds, also)
            also = {}
        memory = Result(ticked["peak_bytes"], None, None, 1, "B", note=f"of the tick, {BESIDE}")
        book.record(f"tick_memory{suffix}", memory)
        _claims(environment, suffix, book)


def _record(book: Book, name: str, seconds: list[float], also: dict[str, Any]) -> None:
    if len(seconds) > 1:
        also = {**also, "longest_ms": 1000 * max(seconds)}
    book.record(name, Result(statistics.median(seconds), None, None, len(seconds), also=also))


def _claims(environment: dict[str, str], suffix: str, book: Book) -> None:
    """Each of the imagers tries each operation, in the same order, as soon as all are there."""
    start = str(time.time() + 2 * IMAGERS)  # until all have started
    children = [_child(environment, "claim", start) for _ in range(IMAGERS)]
    told = [_told(each) for each in children]
    claimed = [id_ for each in told for id_ in each["claimed"]]
    if len(claimed) != len(set(claimed)) or len(claimed) != CLAIMED:
        raise RuntimeError(f"{len(claimed)} claims of {CLAIMED} operations by {IMAGERS} imagers")
    took = max(each["end"] for each in told) - float(start)
    also = {
        "operations": CLAIMED,
        "claims_per_second": CLAIMED / took,
        "attempts_per_second": IMAGERS * CLAIMED / took,
        "of_each": sorted(len(each["claimed"]) for each in told),
    }
    note = f"all {IMAGERS} processes try each operation, in the same order"
    book.record(f"claim_8_imagers{suffix}", Result(took, None, None, 1, note=note, also=also))


def _child(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.many_schedules", *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _told(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What the child says last. Raises RuntimeError with its complaint where it failed."""
    written, complaint = child.communicate()
    if child.returncode:
        raise RuntimeError(complaint.strip().splitlines()[-1] if complaint else "it said nothing")
    told: dict[str, Any] = json.loads(written.splitlines()[-1])
    return told


def _names(suffix: str) -> tuple[str, ...]:
    ticks = (f"tick_{name}{suffix}" for name in DUE)
    return (*ticks, f"tick_memory{suffix}", f"claim_8_imagers{suffix}")


FIGURES = [
    Figure(_names(""), None, on_postgresql),
    Figure(_names("_sqlite"), None, on_sqlite),
]
