"""`python -m services.api [--bind …] [--port …]`."""

import argparse

import uvicorn

from services.api.app import create_app
from shared.logs import configure


def main() -> None:
    parser = argparse.ArgumentParser(prog="services.api", description="Serve Triptych's HTTP API.")
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", default=8000, type=int, help="port (%(default)s)")
    asked = parser.parse_args()
    configure()
    # A caller may be waiting 60 s for an operation: a stop does not wait for it.
    uvicorn.run(
        create_app(),
        host=asked.bind,
        port=asked.port,
        log_config=None,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main()
