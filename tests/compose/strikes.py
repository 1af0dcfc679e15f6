"""Faults that last as long as their block: what is struck is a container of the deployment."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.composed import Deployment
from lab.containers import run

LIBRARY = "clock.so"
SMALL = 2**30
"""Bytes; what is larger is no file system that a test made to be filled."""


@contextmanager
def lasting(seconds: float) -> Iterator[None]:
    """A block that takes so long at least."""
    began = time.monotonic()
    yield
    time.sleep(max(0.0, began + seconds - time.monotonic()))


@contextmanager
def paused(deployment: Deployment, service: str) -> Iterator[None]:
    """Its processes stand still; its kernel goes on acknowledging what is sent to it."""
    deployment.compose("pause", service)
    try:
        yield
    finally:
        deployment.compose("unpause", service)


@contextmanager
def silenced(deployment: Deployment, *services: str) -> Iterator[None]:
    """Every packet from and to them is dropped, those of open connections too."""
    pids = [deployment.inspect(service)["State"]["Pid"] for service in services]
    for pid in pids:
        _rules(pid, "--insert")
    try:
        yield
    finally:
        for pid in pids:
            _rules(pid, "--delete")


def _rules(pid: int, verb: str) -> None:
    path = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net", "iptables", "--wait", verb]
    for chain, way in (("INPUT", "--in-interface"), ("OUTPUT", "--out-interface")):
        run([*enter, chain, "!", way, "lo", "--jump", "DROP"], path)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Not a byte is free on the file system that is mounted here.

    Raises ValueError for anything but the mount of a small one: a directory that is none would
    have the machine's own disk filled, and all that runs on it fail.
    """
    if not disk.is_mount() or shutil.disk_usage(disk).total > SMALL:
        raise ValueError(f"{disk} is not the mount of a small file system; nothing was filled")
    filler = disk / "filler"
    with filler.open("wb") as file:
        try:
            block = 16 * 2**20
            while block:  # ever smaller pieces, until none fits
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, block)
                except OSError:
                    block //= 2
            yield
        finally:
            filler.unlink()


@contextmanager
def clock_off(deployment: Deployment, seconds: int, *services: str) -> Iterator[None]:
    """These containers are made anew with a clock that is ahead by so much, or behind."""
    library = f"LD_PRELOAD=/opt/clock/{LIBRARY}"
    deployment.environment["FAULTS_CLOCK"] = f"{library} CLOCK_OFF={seconds}"
    try:
        deployment.compose("up", "--detach", "--no-deps", "--wait", "--no-build", *services)
        yield
    finally:
        del deployment.environment["FAULTS_CLOCK"]
        deployment.compose("up", "--detach", "--no-deps", "--wait", "--no-build", *services)


def build_clock(into: Path) -> None:
    """The library that gives a process a wrong clock."""
    source = Path(__file__).with_name("clock.c")
    run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(into / LIBRARY), str(source)])
