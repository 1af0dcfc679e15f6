"""`python -m services.api [--bind …] [--port …]`."""

import argparse
from types import FrameType

import uvicorn
from fastapi import FastAPI

from services.api.app import create_app
from shared.logs import configure


class Server(uvicorn.Server):
    """Answers those who wait for an operation as soon as it is told to stop."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = app.state.stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping.set()
        super().handle_exit(sig, frame)


def main() -> None:
    parser = argparse.ArgumentParser(prog="services.api", description="Serve Triptych's HTTP API.")
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", default=8000, type=int, help="port (%(default)s)")
    asked = parser.parse_args()
    configure()
    app = create_app()
    config = uvicorn.Config(
        app, host=asked.bind, port=asked.port, log_config=None, timeout_graceful_shutdown=3
    )
    Server(app, config).run()


if __name__ == "__main__":
    main()
