"""Real operations to be struck by faults, and what must be true of them when all is over."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx

from lab.composed import Deployment

ENDED = ("succeeded", "failed", "cancelled")
PROMPT = 15.0
"""Seconds within which the API answers, come what may: some ten, on a machine that is busy."""
IMAGES, SNAPSHOTS = "images", "snapshot"
Found = TypeVar("Found")


def until(look: Callable[[], Found], seconds: float, what: str) -> Found:
    """The first true value of `look`; fails after that time."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)  # what is looked for may last for half a second
    return found


@dataclass
class Asked:
    """A request for an operation, which can be sent again."""

    path: str
    body: dict[str, Any]
    key: str = field(default_factory=lambda: uuid4().hex)
    operation: str | None = None
    """The operation's id, once an answer gave it."""


class Work:
    """Requests for copies of one server, and the operations that they became."""

    def __init__(self, deployment: Deployment, server: str, vault: Path) -> None:
        self.deployment, self.server, self.vault = deployment, server, vault
        token = (deployment.secrets / "token").read_text()
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{deployment.port}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
        )
        self.asked: list[Asked] = []
        self.answers: Counter[str] = Counter()
        self.slowest = 0.0
        self.server_id = str(self.get(f"/v1/servers/{server}").json()["id"])
        self._before = {each["id"] for each in self._listed("/v1/operations")}

    # Requests

    def get(self, path: str, **parameters: Any) -> httpx.Response:
        return self._timed(lambda: self._http.get(path, params=parameters))

    def image(self) -> Asked:
        return self.ask(IMAGES, {})

    def snapshot(self) -> Asked:
        return self.ask(SNAPSHOTS, {"replace": True})

    def ask(self, what: str, body: dict[str, Any]) -> Asked:
        """Ask for a copy; the answer may be the problem that says the database is away."""
        asked = Asked(f"/v1/servers/{self.server}/{what}", body)
        self.asked.append(asked)
        self._send(asked)
        return asked

    def ask_again(self) -> None:
        """Send every request once more, with its key, until it is accepted."""
        for each in self.asked:
            until(lambda each=each: self._send(each), 90, "accepted")  # type: ignore[misc]

    def _send(self, asked: Asked) -> bool:
        response = self._timed(
            lambda: self._http.post(
                asked.path, json=asked.body, headers={"Idempotency-Key": asked.key}
            )
        )
        if response.status_code == 202:
            operation = response.json()["id"]
            assert asked.operation in (None, operation), "one key, two operations"
            asked.operation = operation
            self.answers["accepted"] += 1
            return True
        assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
        assert response.headers["Retry-After"]
        self.answers["503"] += 1
        return False

    def _timed(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        began = time.monotonic()
        response = send()
        self.slowest = max(self.slowest, time.monotonic() - began)
        return response

    def _listed(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        after = None
        while True:
            more = {"after": after} if after else {}
            page = self.get(path, limit=100, server=self.server_id, **more, **parameters).json()
            items += page["items"]
            if not (after := page["next"]):
                return items

    # Operations

    def operations(self) -> list[dict[str, Any]]:
        """All of the server's operations since this work began."""
        return [op for op in self._listed("/v1/operations") if op["id"] not in self._before]

    def wait_running(self) -> None:
        """An operation is seen at work; where all have ended unseen, another image is asked for."""

        def running() -> bool:
            states = {op["state"] for op in self.operations()}
            if states <= set(ENDED):
                self.image()
            return "running" in states

        self._until(running, 60, "an operation runs")

    def wait_ended(self, seconds: float = 240) -> list[dict[str, Any]]:
        def ended() -> list[dict[str, Any]]:
            found = self.operations()
            return found if all(op["state"] in ENDED for op in found) else []

        return self._until(ended, seconds, "all operations ended")

    def _until(self, look: Callable[[], Found], seconds: float, what: str) -> Found:
        """As `until`; its failure tells what became of the operations, and what was logged."""
        try:
            return until(look, seconds, what)
        except AssertionError as failure:
            failure.add_note(json.dumps(self.operations(), indent=1))
            failure.add_note(self.deployment.logs())
            raise

    # Truth

    def check(self) -> str:
        """Every request became one operation, which ended and did once what it says it did.

        All of them succeeded: none of these faults is a reason to fail. Returns a summary.
        """
        operations = self.wait_ended()
        asked = [each.operation for each in self.asked]
        assert sorted(map(str, asked)) == sorted(op["id"] for op in operations)
        assert [op["error"] for op in operations if op["state"] != "succeeded"] == []
        self._check_images()
        self._check_snapshot(operations)
        self._check_events(operations)
        assert self._leftovers() == []
        attempts = [op["attempt"] for op in operations]
        return (
            f"{len(asked)} asked, {len(operations)} succeeded, 0 lost, 0 doubled; attempts "
            f"{attempts}; answers {dict(self.answers)}, slowest {self.slowest:.1f} s"
        )

    def _check_images(self) -> None:
        """Image operations that succeeded, rows of images and folders are the same ones."""
        made = self._listed("/v1/operations", kind="image.create", state="succeeded")
        rows = {image["id"] for image in self._listed("/v1/images")}

        assert rows == {op["result"]["image"] for op in made}
        assert rows == self._folders("images")

    def _check_snapshot(self, operations: list[dict[str, Any]]) -> None:
        """The one snapshot is the newest operation's, as row and as folder."""
        taken = [op for op in operations if op["kind"] == "snapshot.take"]
        if not taken:
            return
        newest = taken[0]["result"]["snapshot"]  # they are listed newest first
        row = self.get(f"/v1/servers/{self.server}/snapshot").json()

        assert newest == row["id"]
        assert {newest} == self._folders("snapshots")

    def _check_events(self, operations: list[dict[str, Any]]) -> None:
        """What each operation made was told once."""
        sql = "SELECT json_agg(data) FROM event WHERE type LIKE 'triptych.operation.succeeded'"
        told = Counter(each["operation"] for each in json.loads(query(self.deployment, sql)))

        assert {1} == {told[op["id"]] for op in operations}

    def _folders(self, kind: str) -> set[str]:
        return {path.name for path in (self.vault / kind / self.server_id).iterdir()}

    def _leftovers(self) -> list[str]:
        return [
            str(path)
            for path in self.vault.glob("*/*/*")
            if path.suffix in (".partial", ".deleting")
        ]


def query(deployment: Deployment, sql: str) -> str:
    """What PostgreSQL answers, by its own client in its container."""
    command = ("psql", "--username=triptych", "--no-align", "--tuples-only", f"--command={sql}")
    return deployment.execute("postgres", *command).strip()


def health(deployment: Deployment, service: str) -> tuple[str, str]:
    """Docker's verdict on a container, and what its last check printed."""
    found = deployment.inspect(service)["State"]["Health"]
    return found["Status"], found["Log"][-1]["Output"]


def wait_health(deployment: Deployment, service: str, status: str, seconds: float = 90) -> str:
    """Wait for a verdict; returns what the check printed."""

    def said() -> str:
        verdict, output = health(deployment, service)
        return output or " " if verdict == status else ""

    return until(said, seconds, f"{service} {status}")
