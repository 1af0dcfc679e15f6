"""The part `load`: what the API, the queues and the engine bear when copies cost next to nothing.

Everything goes through the API of a running stack (`bench.target`), whose workers write down
what they do outside of the database. After each phase the two are compared: nothing lost,
nothing done twice, every server's operations one by one in the order they were accepted.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any

from bench.book import Book
from bench.client import Api
from bench.figure import Figure
from bench.result import Result
from bench.target import Target, composed_stack

RATE = 20
"""Commands a second of the steady phase; they arrive at random (Poisson), whatever the answers."""
STEADY = 1200
"""Commands of the steady phase: its p99 is the twelfth slowest."""
WARM_UP = 100
"""Commands at the same rate before: what a process does for the first time takes longer."""
THOUSAND = 1000
SENDERS = 10
READS = 2000
TOO_LONG_S = 180
_NUMBERS = itertools.count()


def measure(_site: None, book: Book) -> None:
    with composed_stack() as target:
        for name, result in asyncio.run(drive(target)).items():
            book.record(name, result)


async def drive(target: Target) -> dict[str, Result]:
    """All figures of a stack that has nothing else to do."""
    api = Api(target.url, target.token)
    try:
        servers = await _registered(api)
        await _steady(api, servers, WARM_UP)
        results = await _steady(api, servers, STEADY)
        results |= await _reading(api, servers)
        results |= await _thousand(api, servers)
        _check(target, await api.pages("/operations"), accepted=next(_NUMBERS))
    finally:
        api.close()
    for name, size in target.memory().items():
        results[f"memory_{name}"] = Result(size / 2**20, None, None, 1, "MiB")
    return results


async def _registered(api: Api) -> list[str]:
    """The ids of servers, one for each domain of the first host."""
    host = (await api.pages("/hosts"))[0]["name"]
    for domain in await api.pages(f"/hosts/{host}/domains"):
        if domain["server"] is None:
            await api.post("/v1/servers", {"host": host, "domain": domain["name"]}, 201)
    return [server["id"] for server in await api.pages("/servers")]


def _command(server: str) -> tuple[str, dict[str, Any]]:
    """Path and body of a command, to each of the three services in turn."""
    number = next(_NUMBERS)
    bodies: dict[str, dict[str, Any]] = {
        "snapshot": {"replace": True},
        "images": {},
        "clones": {"name": f"clone-{number}"},
    }
    noun, body = list(bodies.items())[number % len(bodies)]
    return f"/v1/servers/{server}/{noun}", body


async def _steady(api: Api, servers: list[str], count: int) -> dict[str, Result]:
    """Commands at a rate, each read once afterwards as its client would."""
    arrivals = random.Random(RATE)  # noqa: S311  the same ones in each run
    accepted, read, asked = [], [], []

    async def ask(server: str) -> None:
        answer = await api.post(*_command(server))
        accepted.append(answer.seconds)
        answer = await api.get(f"/v1/operations/{answer.json()['id']}")
        read.append(answer.seconds)

    due = time.monotonic()
    for number in range(count):
        due += arrivals.expovariate(RATE)
        await asyncio.sleep(due - time.monotonic())
        asked.append(asyncio.create_task(ask(servers[number % len(servers)])))
    await asyncio.gather(*asked)
    done = (await _done(api))[:count]
    waits = [_moment(each, "started_at") - _moment(each, "created_at") for each in done]
    return {
        "accept_to_start_p50": _of(statistics.median(waits), waits),
        "accept_to_start_p99": _of(_p99(waits), waits),
        "accepted_p99": _of(_p99(accepted), accepted),
        "read_p99": _of(_p99(read), read),
    }


async def _reading(api: Api, servers: list[str]) -> dict[str, Result]:
    """As many reads as the API answers, of one thing and of a page of 50."""
    operation = (await api.get("/v1/operations?limit=1")).json()["items"][0]["id"]
    single = itertools.cycle([f"/v1/operations/{operation}", f"/v1/servers/{servers[0]}"])
    one = await _rate(READS, lambda: api.get(next(single)))
    page = await _rate(READS // 10, lambda: api.get("/v1/servers?limit=50"))
    return {
        "reads_per_second": Result(one, None, None, READS, "/s"),
        "pages_per_second": Result(page, None, None, READS // 10, "/s"),
    }


async def _thousand(api: Api, servers: list[str]) -> dict[str, Result]:
    """Commands as fast as they are accepted, then wait until the workers have done them all.

    Each sender has servers of its own, so that what was accepted first is beyond dispute."""
    mine = [itertools.cycle(servers[first::SENDERS]) for first in range(SENDERS)]

    async def send(servers: Any) -> None:
        await api.post(*_command(next(servers)))

    rate = await _rate(THOUSAND, *(lambda own=own: send(own) for own in mine))
    newest = (await _done(api))[:THOUSAND]
    began = min(_moment(each, "created_at") for each in newest)
    took = max(_moment(each, "finished_at") for each in newest) - began
    return {
        "accepted_per_second": Result(rate, None, None, THOUSAND, "/s"),
        "thousand_operations": Result(took, None, None, THOUSAND),
        "operations_per_second": Result(THOUSAND / took, None, None, THOUSAND, "/s"),
    }


async def _rate(count: int, *calls: Callable[[], Coroutine[Any, Any, Any]]) -> float:
    """Calls a second, made by `SENDERS` senders, each as soon as its last one was answered."""

    async def sender(call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        for _ in range(count // SENDERS):
            await call()

    began = time.perf_counter()
    await asyncio.gather(*(sender(calls[n % len(calls)]) for n in range(SENDERS)))
    return count / (time.perf_counter() - began)


async def _done(api: Api) -> list[Any]:
    """All operations, newest first, once none is left to do."""
    end = time.monotonic() + TOO_LONG_S
    for state in ("queued", "running"):
        while (await api.get(f"/v1/operations?state={state}&limit=1")).json()["items"]:
            if time.monotonic() > end:
                raise RuntimeError(f"operations are {state} after {TOO_LONG_S} s")
            await asyncio.sleep(0.1)
    return await api.pages("/operations")


def _check(target: Target, operations: list[Any], accepted: int) -> None:
    """Compare what was accepted with what the workers wrote down. Raises RuntimeError."""
    if len(operations) != accepted:
        raise RuntimeError(f"{accepted} commands were accepted, {len(operations)} are known")
    expected: dict[str, list[tuple[str, str]]] = defaultdict(list)
    happened: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for operation in reversed(operations):
        expected[operation["server"]] += [("began", operation["id"]), ("ended", operation["id"])]
    for line in target.executions.read_text().splitlines():
        what, server, operation = line.split()
        happened[server].append((what, operation))
    for server in expected.keys() | happened.keys():
        if expected[server] != happened[server]:
            raise RuntimeError(
                f"server {server}: accepted {expected[server]}, done {happened[server]}"
            )


def _moment(operation: Any, name: str) -> float:
    return datetime.fromisoformat(operation[name]).timestamp()


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def _of(value: float, values: list[float]) -> Result:
    return Result(value, None, None, len(values))


FIGURES = [
    Figure(
        (
            "accept_to_start_p50",
            "accept_to_start_p99",
            "accepted_per_second",
            "reads_per_second",
            "thousand_operations",
        ),
        None,
        measure,
    )
]
