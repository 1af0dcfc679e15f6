"""The part `snapshot`: what a snapshot costs from the request to its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path

import httpx

from bench.result import Result
from embedded.stack import Stack, free_port
from lab import filesystems
from lab.guest import Guest
from lab.libvirtd import libvirtd

RUNS = 100
FICLONE = 0x40049409


def measure() -> dict[str, Result]:
    """`snapshot_api`: a stopped one-disk server on a reflink vault, POST to `succeeded`."""
    with contextlib.ExitStack() as undo:
        hypervisor = undo.enter_context(libvirtd())
        folder = undo.enter_context(filesystems.xfs(2 * 2**30))
        state = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="triptych-bench-")))
        guest = undo.enter_context(Guest.create(hypervisor, folder / "disks"))
        stack = Stack(
            state,
            port=free_port(),
            settings={
                "TRIPTYCH_LIBVIRT_URI": hypervisor.uri,
                "TRIPTYCH_VAULT": str(folder / "vault"),
            },
        )
        undo.callback(stack.stop)
        stack.start()
        client = undo.enter_context(
            httpx.Client(
                base_url=f"{stack.url}/v1",
                headers={"Authorization": f"Bearer {stack.token}"},
                timeout=60,
            )
        )
        registered = client.post("/servers", json={"host": "local", "domain": guest.name})
        registered.raise_for_status()
        ours, bare = [], []
        for _ in range(RUNS):
            ours.append(_through_the_api(client, guest.name))
            bare.append(_ficlone(guest.disks[0], folder / "bare"))
    return {"snapshot_api": Result.of(ours, bare, "bare FICLONE of the disk")}


def _through_the_api(client: httpx.Client, server: str) -> float:
    started = time.perf_counter()
    accepted = client.post(f"/servers/{server}/snapshot", json={"replace": True})
    accepted.raise_for_status()
    path = f"/operations/{accepted.json()['id']}"
    operation = client.get(path, params={"wait": 30}).json()
    took = time.perf_counter() - started
    if operation["state"] != "succeeded":
        raise RuntimeError(f"the snapshot {operation['state']}: {operation['error']}")
    return took


def _ficlone(source: Path, target: Path) -> float:
    started = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as write:
        fcntl.ioctl(write, FICLONE, read.fileno())
        os.fsync(write)
    took = time.perf_counter() - started
    target.unlink()
    return took
