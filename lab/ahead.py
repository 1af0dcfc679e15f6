"""Owns nothing: has the images that the tests stand on made before a test waits for them.

On a machine that has none of them this takes minutes, most of them packages' downloads; so it is
done side by side, and `.ci/run` does it beside the linters. Where all are there it takes seconds.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.composed import Deployment
from lab.containers import STAND_INS, Engine, engine
from lab.image import image


def main() -> None:
    """Raises what the first test that needs the image would have raised."""
    with engine() as found, TemporaryDirectory() as state, ThreadPoolExecutor() as pool:
        found.ensure("debian:trixie-slim")  # the others are made from it
        made = [
            pool.submit(image),
            pool.submit(found.ensure, *STAND_INS),
            pool.submit(_services, found, Path(state)),
        ]
        for each in made:
            each.result()


def _services(engine: Engine, state: Path) -> None:
    Deployment(engine, state, "triptych-ahead", profiles=("demo", "debug")).build()


if __name__ == "__main__":
    main()
