"""A server that is off is its owner's to start, also while it is streamed."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from operations.waiting import wait_for

from lab.guest import Guest
from lab.libvirtd import Hypervisor
from lab.qemu_img import slowed
from shared.disks import engine
from shared.disks.engine import capture
from shared.disks.errors import CopyFailed, ServerChanged
from shared.hypervisor.connection import connect
from shared.hypervisor.domains import find_by_name
from shared.hypervisor.watchdog import Watchdog

pytestmark = pytest.mark.vm
MIB = 1 << 20


@pytest.fixture
def streaming(
    watchdog: Watchdog, folder: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Guest], object]:
    """Stream a server, which takes minutes; on leaving the block that has to have been refused."""
    given_up = threading.Event()

    @contextmanager
    def begun(server: Guest) -> Iterator[None]:
        domain = find_by_name(connect(server.hypervisor.uri), server.name)
        errors: list[BaseException] = []

        def stream() -> None:
            try:
                capture(domain, folder, watchdog=watchdog, way="stream", cancelled=given_up.is_set)
            except BaseException as error:
                errors.append(error)

        monkeypatch.setenv("PATH", slowed(workspace))
        thread = threading.Thread(target=stream)
        thread.start()
        try:
            wait_for(lambda: errors or list(folder.iterdir()))
            yield
            thread.join(90)
        finally:
            given_up.set()
            thread.join()
        assert [type(error) for error in errors] == [ServerChanged]
        assert list(folder.iterdir()) == []

    return begun


def test_it_can_be_started(
    hypervisor: Hypervisor, xfs: Path, streaming: Callable[[Guest], object]
) -> None:
    """It boots and runs; the copy of what it writes to is ended and not kept."""
    with Guest.create(hypervisor, xfs / "started", disks=["qcow2"]) as made:
        with streaming(made):
            made.start()
        assert made.state() == "running"
        made.write("/root/word", "written")


@pytest.mark.parametrize(
    ("written", "refusal"), [(True, ServerChanged), (False, CopyFailed)], ids=["written", "broken"]
)
def test_a_copy_that_fails_of_it_says_so(
    hypervisor: Hypervisor,
    xfs: Path,
    watchdog: Watchdog,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: bool,
    refusal: type[Exception],
) -> None:
    """qemu-img may read tables that the guest is changing before anybody looks again. Where nobody
    wrote, the copy has failed as such."""

    def fail(source: Path, *_arguments: object, **_options: object) -> None:
        if written:
            with source.open("r+b") as file:
                file.write(b"QFI")  # what it begins with
        raise CopyFailed(f"{source.name} could not be copied: Image is corrupt.")

    monkeypatch.setattr(engine, "stream_copy", fail)
    with Guest.create(hypervisor, xfs / f"failing-{written}", disks=["qcow2"]) as made:
        domain = find_by_name(connect(hypervisor.uri), made.name)
        with pytest.raises(refusal):
            capture(domain, folder, watchdog=watchdog, way="stream")
    assert list(folder.iterdir()) == []


def test_a_backing_file_that_was_written_meanwhile_is_noticed(
    hypervisor: Hypervisor, xfs: Path, streaming: Callable[[Guest], object]
) -> None:
    """Far down, as by `qemu-img commit` or another server that stands on it: nobody writes to the
    disk's own file then."""
    with Guest.create(hypervisor, xfs / "chained", disks=["qcow2"]) as made:
        (disk,) = made.disks
        base = below = disk.rename(disk.with_suffix(".base"))
        for overlay in (disk.with_suffix(".middle"), disk):
            command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", "qcow2"]
            subprocess.run([*command, str(overlay)], check=True)
            below = overlay
        with streaming(made), base.open("r+b") as file:
            file.write(b"QFI")  # what it begins with


def test_a_device_that_was_written_meanwhile_is_noticed(
    hypervisor: Hypervisor, xfs: Path, workspace: Path, streaming: Callable[[Guest], object]
) -> None:
    """As by a server that was started and is off again: libvirt gives its QEMU a node of its own
    for the device, and the host's has no newer time stamp."""
    file = xfs / "device.raw"
    file.write_bytes(os.urandom(16 * MIB))  # slowed, that takes minutes to copy
    losetup = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    node = workspace / "node"
    os.mknod(node, stat.S_IFBLK | 0o600, Path(device).stat().st_rdev)
    try:
        with Guest.create(hypervisor, xfs / "device", disks=[str(file)]) as made:
            xml = made.domain.XMLDesc().replace(f"file='{file}'", f"dev='{device}'")
            made.connection.defineXML(xml.replace("<disk type='file'", "<disk type='block'"))
            with streaming(made):
                descriptor = os.open(node, os.O_WRONLY)
                os.pwrite(descriptor, b"written", 0)
                os.fsync(descriptor)
                os.close(descriptor)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        file.unlink()
