"""One HTTP conversation with the API: retries, idempotency keys, pages, event streams.

Knows nothing of servers or images; `triptych.nouns` does.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from triptych.config import Access
from triptych.problem import Problem, Unreachable
from triptych.types import Event, Page

PAGE = 100
"""Items asked for at a time."""

BACKOFF = (0.2, 0.5, 1.0)
"""Seconds before each further try."""

STREAM_SILENCE = 90.0
"""Seconds without a byte after which an event stream is opened again."""


def path_of(*segments: str) -> str:
    """`/v1/…` with each segment quoted, so that no name can leave its place in the path."""
    quoted = []
    for segment in segments:
        if not segment:
            raise Problem("name_empty", "A name or id is empty. Give the name of the thing meant.")
        dots_only = not segment.strip(".")
        quoted.append(segment.replace(".", "%2E") if dots_only else quote(segment, safe=""))
    return "/v1/" + "/".join(quoted)


class Transport:
    """Sends requests to one API; raises `Problem` for refusals, `Unreachable` for silence."""

    def __init__(
        self, access: Access, *, timeout: float = 30.0, http: httpx.Client | None = None
    ) -> None:
        self.url = access.url
        self.timeout = timeout
        headers = {"Accept": "application/json, application/problem+json"}
        if access.token:
            headers["Authorization"] = f"Bearer {access.token}"
        self._http = http or httpx.Client(timeout=timeout)
        self._headers = headers

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, *, timeout: float | None = None, **params: Any) -> Any:
        return self._json(self._send("GET", path, params=params, timeout=timeout))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A POST that is answered on the spot."""
        return self._json(self._send("POST", path, body=body))

    def start(
        self, path: str, body: Mapping[str, Any] | None = None, *, method: str = "POST"
    ) -> Any:
        """Asks for long work. One fresh key covers all tries: the work starts once."""
        key = str(uuid.uuid4())
        return self._json(self._send(method, path, body=body, key=key))

    def put(self, path: str, body: Mapping[str, Any], **params: Any) -> Any:
        return self._json(self._send("PUT", path, params=params, body=body))

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json(self._send("PATCH", path, body=body))

    def delete(self, path: str) -> Any:
        """A DELETE that is answered on the spot; None where there is nothing to say."""
        return self._json(self._send("DELETE", path))

    def items(self, path: str, *, after: str | None = None, **params: Any) -> Iterator[Any]:
        """Every item of a list, page by page."""
        cursor = after
        while True:
            page = self.page(path, after=cursor, **params)
            yield from page
            if not page.next or page.next == cursor:
                return
            cursor = page.next

    def page(self, path: str, *, limit: int = PAGE, **params: Any) -> Page[Any]:
        document = self.get(path, limit=limit, **params)
        return Page(document["items"], document.get("next"))

    def list(self, path: str, *, limit: int | None = None, **params: Any) -> Page[Any]:
        """The first `limit` items (all of them when None) and the cursor of what follows."""
        found: Page[Any] = Page()
        cursor = params.pop("after", None)
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = self.page(path, limit=size, after=cursor, **params)
            found.extend(page)
            found.next = page.next
            if not page.next or page.next == cursor:
                break
            cursor = page.next
        return found

    def stream(
        self, path: str, last_event_id: str | None, on_open: Callable[[], None]
    ) -> Iterator[tuple[str, Event | None]]:
        """One connection's worth of Server-Sent Events as (id, event), or an id alone. Raises as
        `get` does.

        `on_open` is called once the API has taken the connection, events or not.
        """
        headers = {**self._headers, "Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        timeout = httpx.Timeout(self.timeout, read=STREAM_SILENCE)
        try:
            with self._http.stream(
                "GET", self.url + path, headers=headers, timeout=timeout
            ) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise Problem.from_response(response)
                on_open()
                yield from _events(response.iter_lines(), last_event_id or "")
        except httpx.HTTPError as error:
            raise Unreachable(self.url, error) from error

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        key: str | None = None,
        timeout: float | None = None,
    ) -> httpx.Response:
        request = self._http.build_request(
            method,
            self.url + path,
            params={name: value for name, value in (params or {}).items() if value is not None},
            json=body,
            headers={**self._headers, **({"Idempotency-Key": key} if key else {})},
            timeout=timeout or self.timeout,
        )
        repeatable = method in ("GET", "PUT") or key is not None
        for delay in (*BACKOFF, None):
            try:
                response = self._http.send(request)
            except httpx.HTTPError as error:
                # A connection that never stood cannot have carried the request.
                unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if delay is None or not (repeatable or unsent):
                    raise Unreachable(self.url, error) from error
            else:
                if response.is_success:
                    return response
                if delay is None or not (repeatable and _away(response)):
                    raise Problem.from_response(response)
            time.sleep(delay)
        raise AssertionError("the last try either answers or raises")

    def _json(self, response: httpx.Response) -> Any:
        if response.status_code == httpx.codes.NO_CONTENT:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise Problem.from_response(response) from error


def _away(response: httpx.Response) -> bool:
    """Whether the API, or its database, was away for the moment."""
    return response.status_code in (502, 503, 504)


def _events(lines: Iterator[str], last: str) -> Iterator[tuple[str, Event | None]]:
    """Parses Server-Sent Events; comments and fields unknown to it are passed over.

    The first may be no event, but the id after which those to come are.
    """
    data: list[str] = []
    for line in lines:
        if not line:
            yield last, json.loads("\n".join(data)) if data else None
            data = []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "id" and "\0" not in value:
            last = value
