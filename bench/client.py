"""A small HTTP client for `bench.load`: one event loop, kept-alive connections, little else.

The generator shares the machine with what it measures, so what it costs is kept low.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    status: int
    seconds: float
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


KEPT_S = 3
"""How long an idle connection is used again; uvicorn closes it after five seconds."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Api:
    """The API at an address; each request takes an idle connection or opens one."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = f"HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {token}\r\n"
        self._idle: list[tuple[float, Connection]] = []

    async def get(self, path: str) -> Answer:
        return await self._ask("GET", path, b"", 200)

    async def post(self, path: str, document: dict[str, Any], expected: int = 202) -> Answer:
        return await self._ask("POST", path, json.dumps(document).encode(), expected)

    async def pages(self, path: str) -> list[Any]:
        """All items of a list."""
        items: list[Any] = []
        after = ""
        while True:
            page = (await self.get(f"/v1{path}?limit=200{after}")).json()
            items += page["items"]
            if page["next"] is None:
                return items
            after = f"&after={page['next']}"

    async def _ask(self, method: str, path: str, body: bytes, expected: int) -> Answer:
        began = time.perf_counter()
        async with self._connection() as (reader, writer):
            head = f"{method} {path} {self._head}Content-Length: {len(body)}\r\n"
            if body:
                head += "Content-Type: application/json\r\n"
            writer.write(f"{head}\r\n".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            content = await reader.readexactly(length)
        status = int(answer.split(b" ", 2)[1])
        if status != expected:
            raise RuntimeError(f"{method} {path} answered {status}: {content.decode()}")
        return Answer(status, time.perf_counter() - began, content)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        since, connection = self._idle.pop() if self._idle else (0, None)
        if connection is None or time.monotonic() - since > KEPT_S:
            self.close()  # the others have been idle for longer
            connection = await asyncio.open_connection(self._host, self._port)
        try:
            yield connection
        except BaseException:
            connection[1].close()
            raise
        self._idle.append((time.monotonic(), connection))

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            _, (_, writer) = self._idle.pop()
            writer.close()
