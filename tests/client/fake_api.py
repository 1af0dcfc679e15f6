"""A small real HTTP server that speaks the API's contract, told by each test what to say."""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

NOW = "2030-01-02T03:04:05Z"


def operation(name: str = "op_1", kind: str = "snapshot.take", **fields: Any) -> dict[str, Any]:
    """An operation that has succeeded, unless told otherwise."""
    return {
        "id": name,
        "kind": kind,
        "server": "srv_1",
        "host": "kvm1",
        "state": "succeeded",
        "phase": "done",
        "progress": 100,
        "bytes_done": 0,
        "bytes_total": 0,
        "created_at": NOW,
        "started_at": NOW,
        "finished_at": "2030-01-02T03:04:07Z",
        "requested_by": "ops",
        "attempt": 1,
        "error": None,
        "result": None,
        "undo_until": None,
        **fields,
    }


def problem(status: int, code: str, detail: str, **fields: Any) -> dict[str, Any]:
    return {"type": "about:blank", "title": code, "status": status, "code": code} | {
        "detail": detail,
        **fields,
    }


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any

    @property
    def key(self) -> str | None:
        return self.headers.get("idempotency-key")


@dataclass
class Fake:
    """`answers` by method and path: one answer for ever, or a list to go through."""

    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    drop: int = 0
    """How many of the next requests are read, then cut off without an answer."""
    stumble: int = 0
    """How many of the next requests a proxy answers with 502."""
    streams: list[str] = field(default_factory=list)
    """What each connection to the event stream is told before it is closed."""
    url: str = ""

    def says(self, route: str, body: Any, status: int = 200) -> None:
        self.answers[route] = (status, body)

    def goes_through(self, route: str, *bodies: Any) -> None:
        """Each request gets the next body; the last one stays."""
        self.answers[route] = [(200, body) for body in bodies]

    def starts(self, route: str, *states: dict[str, Any]) -> None:
        """Long work: 202 with the first state, then the states, one a look."""
        self.says(route, {**states[0], "state": "queued", "finished_at": None}, 202)
        self.goes_through(f"GET /v1/operations/{states[0]['id']}", *states)

    def calls(self, route: str) -> list[Request]:
        return [each for each in self.requests if f"{each.method} {each.path}" == route]

    def answer(self, request: Request) -> tuple[int, Any]:
        known = self.answers.get(f"{request.method} {request.path}")
        if known is None:
            return 404, problem(404, "not_found", f"Nothing at {request.path}.")
        if isinstance(known, list):
            return known.pop(0) if len(known) > 1 else known[0]
        return known


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def serve(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("content-length") or 0)
        raw = self.rfile.read(length)
        request = Request(
            self.command,
            parts.path,
            {name: values[0] for name, values in parse_qs(parts.query).items()},
            {name.lower(): value for name, value in self.headers.items()},
            json.loads(raw) if raw else None,
        )
        self.fake.requests.append(request)
        if self.fake.drop:
            self.fake.drop -= 1
            self.close_connection = True
            return
        if self.fake.stumble:
            self.fake.stumble -= 1
            self._send(502, "text/html", b"<h1>Bad Gateway</h1>")
        elif parts.path == "/v1/events/stream":
            self._stream()
        else:
            status, body = self.fake.answer(request)
            kind = "application/json" if status < 400 else "application/problem+json"
            if isinstance(body, str):
                self._send(status, "text/html", body.encode())
            else:
                self._send(status, kind, b"" if status == 204 else json.dumps(body).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        if self.fake.streams:
            self.wfile.write(self.fake.streams.pop(0).encode())
        else:
            time.sleep(30)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: stderr is under test."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


def start() -> tuple[Fake, Server]:
    fake = Fake()
    handler = type("BoundHandler", (Handler,), {"fake": fake})
    server = Server(("127.0.0.1", 0), handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return fake, server
