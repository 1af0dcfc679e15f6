"""The SDK's front door: `Client`, its nouns, waiting for operations, following events."""

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import httpx

from triptych.config import find_access
from triptych.nouns import (
    Clones,
    Domains,
    Events,
    Farms,
    Hosts,
    Images,
    Operations,
    Schedules,
    Servers,
    Snapshots,
)
from triptych.problem import OperationFailed, Problem, Unreachable
from triptych.transport import Transport, path_of
from triptych.types import ENDED, Event, Host, Operation

Answer = TypeVar("Answer")

LONG_POLL = 30.0
"""Seconds the API is asked to hold its answer when nobody looks at progress."""

PATIENCE = 60.0
"""Seconds without the API after which waiting is given up; the work goes on without us."""

RECONNECT = 1.0
"""Seconds between two tries to get back to the API."""


class Client:
    """Talks to one Triptych API.

    URL and token come from the arguments, else from `TRIPTYCH_URL` and `TRIPTYCH_TOKEN` (or
    `TRIPTYCH_TOKEN_FILE`), else from what `triptych login` stored. Raises `NotConfigured`
    where no URL is known. `timeout` is in seconds and holds for each request.

        with Client() as triptych:
            operation = triptych.snapshots.take("web1")
            triptych.wait(operation["id"], check=True)
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 30.0,
        http: httpx.Client | None = None,
    ) -> None:
        access = find_access(url, token)
        self.url = access.url
        self._transport = Transport(access, timeout=timeout, http=http)
        self.hosts = Hosts(self._transport)
        self.domains = Domains(self._transport)
        self.servers = Servers(self._transport)
        self.snapshots = Snapshots(self._transport)
        self.images = Images(self._transport)
        self.clones = Clones(self._transport)
        self.farms = Farms(self._transport)
        self.schedules = Schedules(self._transport)
        self.operations = Operations(self._transport)
        self.events = Events(self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def wait(
        self,
        operation_id: str,
        on_progress: Callable[[Operation], None] | None = None,
        *,
        timeout: float | None = None,
        poll: float | None = None,
        check: bool = False,
    ) -> Operation:
        """Waits until an operation ends and returns it.

        `on_progress` is called with every state seen, the last one included. `poll` is how
        many seconds the API holds an answer (1 with `on_progress`, else 30). An API that
        goes away is waited for up to a minute, then `Unreachable` is raised; the operation
        itself goes on. `timeout` (seconds) raises `TimeoutError`. With `check`, anything but
        success raises `OperationFailed`.
        """
        hold = poll or (1.0 if on_progress else LONG_POLL)
        deadline = None if timeout is None else time.monotonic() + timeout
        first = True
        while True:
            asked = time.monotonic()
            if deadline is not None:
                hold = min(hold, max(0.0, deadline - asked))
            # The first look is without delay: something is on the screen at once.
            operation = self._look(operation_id, None if first else hold)
            if on_progress:
                on_progress(operation)
            if operation["state"] in ENDED:
                if check and operation["state"] != "succeeded":
                    raise OperationFailed(operation)
                return operation
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"Operation {operation_id} did not end within {timeout} s.")
            if not first:
                # Whatever answered early must not turn this loop into a flood.
                time.sleep(max(0.0, min(hold, 1.0) - (now - asked)))
            first = False

    def wait_drained(
        self, host: str, on_progress: Callable[[Host], None] | None = None, *, poll: float = 1.0
    ) -> Host:
        """Waits until a draining host has no work left, and returns it.

        Returns early where waiting is in vain: `silent` is true then, or `draining` no longer.
        An API that goes away is waited for as in `wait`.
        """
        while True:
            found = self._patiently(lambda: self.hosts.get(host))
            if on_progress:
                on_progress(found)
            left = sum(found["operations"].values())
            if not left or found["silent"] or not found["draining"]:
                return found
            time.sleep(poll)

    def follow(self, last_event_id: str | None = None) -> Iterator[Event]:
        """Events as they happen, without end; the connection is renewed where the last ended.

        Raises `Unreachable` at once if the API cannot be reached at the start, later when it
        was away for a minute.
        """
        last = last_event_id
        lost: float | None = None
        opened = False

        def on_open() -> None:
            nonlocal opened, lost
            opened, lost = True, None

        while True:
            try:
                path = path_of("events", "stream")
                for event_id, event in self._transport.stream(path, last, on_open):
                    last = event_id or last
                    if event is not None:
                        yield event
            except Unreachable:
                lost = lost or time.monotonic()
                if not opened or time.monotonic() - lost > PATIENCE:
                    raise
            time.sleep(RECONNECT)

    def _look(self, operation_id: str, hold: float | None) -> Operation:
        try:
            return self._patiently(lambda: self.operations.get(operation_id, wait=hold))
        except Problem as error:
            error.operation = error.operation or operation_id
            raise

    def _patiently(self, look: Callable[[], Answer]) -> Answer:
        """What the look finds, through an API restart if need be."""
        given_up = time.monotonic() + PATIENCE
        while True:
            try:
                return look()
            except Problem as error:
                away = isinstance(error, Unreachable) or error.status >= 500
                if not away or time.monotonic() >= given_up:
                    raise
                time.sleep(RECONNECT)
