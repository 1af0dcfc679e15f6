"""Domains, the connection, the inventory and crash recovery on a real libvirtd."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from lab.guest import Guest
from lab.libvirtd import Hypervisor, libvirtd
from shared import recovery
from shared.hypervisor import inventory, undo
from shared.hypervisor.connection import connect, forget
from shared.hypervisor.definition import DomainDefinition
from shared.hypervisor.domains import Domain, define, find, find_by_name
from shared.hypervisor.duplicate import clone_definition
from shared.hypervisor.errors import (
    DomainMissing,
    LibvirtBusy,
    LibvirtFailed,
    LibvirtUnavailable,
)
from shared.hypervisor.inventory import scan, watch
from shared.hypervisor.memory import memory_saved, resume_from
from shared.hypervisor.pause import paused
from shared.hypervisor.watchdog import Watchdog
from shared.settings import settings
from tests.hypervisor.test_pause import wait_until

pytestmark = pytest.mark.vm
NOBODY = "99999999-aaaa-4bbb-8ccc-dddddddddddd"


@pytest.fixture
def box(hypervisor: Hypervisor, workspace: Path) -> Iterator[Domain]:
    """A small defined domain that is off; nothing waits for it to boot."""
    with Guest.create(hypervisor, workspace, nic=True, graphics=True) as made:
        yield find_by_name(connect(hypervisor.uri), made.name)


def test_one_connection_per_process(hypervisor: Hypervisor) -> None:
    """Asking again gives the same live connection."""
    assert connect(hypervisor.uri) is connect(hypervisor.uri)


def test_no_libvirt_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """A libvirt that does not answer is its own error, and nothing is printed."""
    with pytest.raises(LibvirtUnavailable) as error:
        connect("qemu+unix:///system?socket=/nonexistent")
    assert error.value.code == "libvirt_unavailable"
    assert capfd.readouterr().err == ""


def test_unknown_domains_are_said(hypervisor: Hypervisor) -> None:
    """Neither by UUID nor by name is an unknown domain found."""
    with pytest.raises(DomainMissing):
        find(connect(hypervisor.uri), NOBODY)
    with pytest.raises(DomainMissing):
        find_by_name(connect(hypervisor.uri), "no-such-domain")


def test_a_life(box: Domain) -> None:
    """Start, pause, resume and destroy do what they say, and repeating them is harmless."""
    assert box.state == "stopped"
    box.start()
    box.start()
    assert box.state == "running"
    box.suspend()
    assert box.paused_by_user
    box.resume()
    assert box.state == "running"
    box.destroy()
    box.destroy()
    assert box.state == "stopped"
    assert not box.was_shut_down
    box.start(paused=True)
    assert box.state == "paused"
    box.destroy()


def test_undefine_takes_what_libvirt_keeps_with_it(box: Domain) -> None:
    """A domain with a managed save is undefined all the same; twice is fine; disks stay."""
    xml = box.definition()
    box.start()
    box.call("Saving", lambda handle: handle.managedSave())
    assert box.has_managed_save
    box.undefine()
    box.undefine()
    with pytest.raises(DomainMissing):
        find(connect(box.uri), box.uuid)
    again = define(connect(box.uri), xml)
    assert again.uuid == box.uuid
    assert all(Path(d.path or "").exists() for d in DomainDefinition.parse(xml).disks)


def test_a_start_can_discard_the_saved_state(box: Domain) -> None:
    """After its disks were replaced a server must boot afresh, not wake up."""
    box.start()
    box.call("Saving", lambda handle: handle.managedSave())
    box.start(discard_saved_state=True)
    assert not box.has_managed_save
    box.destroy()


def test_a_bad_definition_is_refused(hypervisor: Hypervisor) -> None:
    """libvirt's refusal comes through as ours."""
    with pytest.raises(LibvirtFailed):
        define(connect(hypervisor.uri), "<domain type='qemu'><name>x</name></domain>")


def test_a_clone_runs_beside_its_source(box: Domain, workspace: Path) -> None:
    """libvirt takes the definition of a clone, and both run at once."""
    source = DomainDefinition.parse(box.definition())
    disk = workspace / "clone.qcow2"
    disk.write_bytes(Path(source.disks[0].path or "").read_bytes())
    made = clone_definition(
        source.xml,
        name=f"{box.name}-clone",
        uuid=NOBODY,
        disk_paths={"vda": str(disk)},
        vcpus=2,
        memory_bytes=224 << 20,
    )
    clone = define(connect(box.uri), made.xml)
    try:
        box.start()
        clone.start()
        assert (box.state, clone.state) == ("running", "running")
        defined = DomainDefinition.parse(clone.live_definition())
        assert (defined.vcpus, defined.memory_bytes) == (2, 224 << 20)
    finally:
        assert undo.undefine_domain(box.uri, NOBODY)
        assert not undo.undefine_domain(box.uri, NOBODY)
    assert disk.exists()


def test_a_tpm_s_directory_is_not_taken_from_under_its_owner_s_start(
    box: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore that was refused since its owner had started the server: libvirt is at making the
    directory, in which there is no more than a lock yet. Once the server is off, it goes."""
    monkeypatch.setenv("TRIPTYCH_LIBVIRT_URI", box.uri)
    settings.cache_clear()
    state = tmp_path / "uuid" / "tpm2" / "tpm2-00.permall"
    state.parent.mkdir(parents=True)
    (state.parent / ".lock").touch()
    (tmp_path / "vda.raw").touch()
    live = {"vda": str(tmp_path / "vda.raw"), "tpm": str(state)}

    undo.start_domain(box.uri, box.uuid)
    recovery.swap_back(live, "op_1", box.uuid, ["tpm"])
    assert state.parent.is_dir() and (state.parent / ".lock").exists()

    undo.stop_domain(box.uri, box.uuid)
    recovery.swap_back(live, "op_1", box.uuid, ["tpm"])
    settings.cache_clear()
    assert not state.parent.exists()


def test_a_disk_counts_as_in_use_where_locks_may_not_tell(
    box: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: rather started anew than left on what goes from under it."""
    other = tmp_path / "other.raw"
    other.touch()
    assert undo.state_on(box.uri, box.uuid, [other]) == "stopped"
    undo.start_domain(box.uri, box.uuid)
    monkeypatch.setattr(undo, "keeps_locks", lambda _path: True)
    assert undo.state_on(box.uri, box.uuid, [other]) == "stopped"
    with monkeypatch.context() as starting:  # its QEMU is yet to open its disks
        starting.setattr(Domain, "is_being_started", True)
        assert undo.state_on(box.uri, box.uuid, [other]) == "running"
    monkeypatch.setattr(undo, "keeps_locks", lambda _path: False)
    assert undo.state_on(box.uri, box.uuid, [other]) == "running"
    undo.stop_domain(box.uri, box.uuid)


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        (libvirt.VIR_DOMAIN_PAUSED_STARTING_UP, "running"),
        (libvirt.VIR_DOMAIN_PAUSED_IOERROR, "running"),
        (libvirt.VIR_DOMAIN_PAUSED_USER, "paused"),
    ],
)
def test_what_a_guest_is_to_be_again(
    box: Domain, monkeypatch: pytest.MonkeyPatch, reason: int, wanted: str
) -> None:
    """One that is being started counts as paused to libvirt, and is to run."""
    told = (libvirt.VIR_DOMAIN_PAUSED, reason)
    monkeypatch.setattr(Domain, "call", lambda _self, _doing, _function: told)
    assert box.wanted_state == wanted


def test_undo_of_power(box: Domain) -> None:
    """Crash recovery starts and stops, and says when there was nothing to do."""
    assert undo.start_domain(box.uri, box.uuid)
    assert not undo.start_domain(box.uri, box.uuid)
    assert undo.is_on(box.uri, box.uuid)
    assert not undo.stop_domain(box.uri, box.uuid, resumed=True)
    first = box.boot
    assert not undo.stop_domain(box.uri, box.uuid, boot=first)
    assert undo.stop_domain(box.uri, box.uuid)
    assert (box.boot, undo.start_domain(box.uri, box.uuid)) == (-1, True)
    assert undo.stop_domain(box.uri, box.uuid, boot=first)
    assert not undo.is_on(box.uri, box.uuid)
    assert not undo.is_on(box.uri, NOBODY)
    assert not undo.stop_domain(box.uri, box.uuid)
    assert not undo.stop_domain(box.uri, NOBODY)
    xml = box.definition()
    box.undefine()
    assert undo.define_domain(box.uri, xml)
    assert undo.define_domain(box.uri, xml)


def test_the_inventory_shows_every_domain(box: Domain, hypervisor: Hypervisor) -> None:
    """Name, state, size and disks as they are; capacity is what the guest sees."""
    found = {facts.uuid: facts for facts in scan(connect(hypervisor.uri))}[box.uuid]
    assert (found.name, found.state, found.vcpus) == (box.name, "stopped", 1)
    assert found.memory_bytes == 192 << 20
    (disk,) = found.disks
    assert (disk.target, disk.format, disk.writable) == ("vda", "qcow2", True)
    assert disk.capacity_bytes
    assert disk.capacity_bytes > Path(disk.path or "").stat().st_size


def test_a_busy_guest_is_listed_all_the_same(
    box: Domain, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may answer nothing for minutes, as while it migrates: it is not asked for what its
    disks' files tell, nor is a domain that is left out gone."""
    box.start()
    monkeypatch.setattr(libvirt.virDomain, "blockInfo", lambda *_given: pytest.fail("asked"))
    assert inventory.facts_of(box).disks[0].capacity_bytes
    box.destroy()

    real = Domain.live_definition

    def busy(domain: Domain) -> str:
        if domain.uuid == box.uuid:
            raise LibvirtBusy("it is busy")
        return real(domain)

    monkeypatch.setattr(Domain, "live_definition", busy)
    monkeypatch.setattr(Domain, "definition", busy)
    connection = connect(hypervisor.uri)
    assert box.uuid not in {facts.uuid for facts in scan(connection)}
    assert box.uuid in inventory.uuids(connection)
    assert isinstance(inventory.addresses(connection), set)


def test_a_sick_domain_does_not_hide_the_others(box: Domain, hypervisor: Hypervisor) -> None:
    """A domain whose disk is gone is still listed, without a capacity."""
    disk = Path(DomainDefinition.parse(box.definition()).disks[0].path or "")
    away = disk.rename(disk.with_suffix(".away"))
    found = {facts.uuid: facts for facts in scan(connect(hypervisor.uri))}[box.uuid]
    assert found.disks[0].capacity_bytes is None
    away.rename(disk)


def test_changes_are_told_soon_and_in_one(box: Domain) -> None:
    """A change is told within a second, and a burst of events makes few calls."""
    calls: list[float] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=watch, args=(box.uri, lambda: calls.append(time.monotonic()), stop)
    )
    thread.start()
    try:
        wait_until(lambda: len(calls) > 0)
        box.start(paused=True)
        took = []
        for change in (box.resume, box.suspend, box.resume, box.suspend):
            seen, began = len(calls), time.monotonic()
            change()
            wait_until(lambda seen=seen: len(calls) > seen)
            took.append(time.monotonic() - began)
        assert min(took) < 1  # the machine may be busy with something else
        seen, began = len(calls), time.monotonic()
        for _ in range(10):
            box.resume()
            box.suspend()
        wait_until(lambda: len(calls) > seen)
        made, lasted = len(calls) - seen, time.monotonic() - began
        assert made <= lasted / inventory.DEBOUNCE_S + 2
    finally:
        stop.set()
        thread.join(60)
        box.destroy()
    assert not thread.is_alive()


def test_loss_is_told_for_as_long_as_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot reach libvirt says so again and again: that is how others know that it lives."""
    monkeypatch.setattr(inventory, "_RETRY_S", 0.01)
    losses: list[str] = []
    stop = threading.Event()
    nowhere = "qemu+unix:///system?socket=/nowhere"

    def lost(reason: str) -> None:
        losses.append(reason)
        if len(losses) == 3:
            stop.set()

    began = time.monotonic()
    watch(nowhere, lambda: None, stop, on_lost=lost, at_least_every_s=0.1)
    assert 0.2 <= time.monotonic() - began < 30
    assert len(losses) == 3


@pytest.fixture
def own(workspace: Path) -> Iterator[Hypervisor]:
    """A libvirtd that may be killed."""
    with libvirtd(workspace / "own", own=True) as hypervisor:
        yield hypervisor
        forget(hypervisor.uri)


def test_libvirtd_may_be_restarted_at_any_time(own: Hypervisor, workspace: Path) -> None:
    """A watch notices and comes back; a held domain works on; a paused guest is resumed."""
    changes: list[float] = []
    losses: list[str] = []
    stop = threading.Event()
    with Guest.create(own, workspace / "g") as made:
        made.start(wait=False)
        domain = find_by_name(connect(own.uri), made.name)
        thread = threading.Thread(
            target=watch,
            args=(own.uri, lambda: changes.append(1.0), stop),
            kwargs={"on_lost": losses.append},
        )
        thread.start()
        watchdog = Watchdog(own.uri, workspace / "holds")
        try:
            wait_until(lambda: bool(changes))
            with paused(domain, watchdog):
                own.stop(kill=True)
                own.start()
            assert domain.state == "running"
            own.stop(kill=True)
            wait_until(lambda: bool(losses))
            seen = len(changes)
            own.start()
            wait_until(lambda: len(changes) > seen)
            assert len(losses) <= 2
        finally:
            stop.set()
            thread.join(60)
            watchdog.close()


def test_a_boot_is_told_from_a_resume(own: Hypervisor, workspace: Path) -> None:
    """Also after a restart of libvirtd; only the one that was resumed is stopped as such."""
    workspace.chmod(0o711)
    saved = workspace / "memory.save"
    with Guest.create(own, workspace / "g") as made:
        made.start(wait=False)
        domain = find_by_name(connect(own.uri), made.name)
        own.stop(kill=True)
        own.start()
        assert domain.was_booted
        assert not undo.stop_domain(own.uri, domain.uuid, resumed=True)
        domain.call("Saving", lambda handle: handle.save(str(saved)))
        resume_from(domain, saved)
        own.stop(kill=True)
        own.start()
        assert (domain.state, domain.was_booted) == ("running", False)
        assert undo.stop_domain(own.uri, domain.uuid, resumed=True)
        assert domain.state == "stopped"


def test_libvirtd_dies_while_a_guest_is_held_with_its_memory(
    own: Hypervisor, workspace: Path
) -> None:
    """It is waited for, the guest runs again at once then, and nothing stays armed."""
    workspace.chmod(0o711)
    with Guest.create(own, workspace / "g") as made:
        made.start(wait=False)
        domain = find_by_name(connect(own.uri), made.name)
        watchdog = Watchdog(own.uri, workspace / "holds")
        back = threading.Timer(1.0, own.start)
        try:
            with (
                pytest.raises(LibvirtUnavailable),
                memory_saved(domain, watchdog, workspace / "memory.save", ["vda"]),
            ):
                own.stop(kill=True)
                try:
                    domain.live_definition()  # as the end of a copy would ask
                finally:
                    back.start()
            assert domain.state == "running"
            assert watchdog._armed == {}
        finally:
            back.join()
            watchdog.close()


def test_a_guest_paused_when_worker_and_libvirtd_die_is_resumed_later(
    own: Hypervisor, workspace: Path
) -> None:
    """The helper outlives its worker until libvirtd is back, and then resumes."""
    from tests.hypervisor.test_pause import worker

    with Guest.create(own, workspace / "g") as made:
        made.start(wait=False)
        process = worker(
            made,
            """
            with paused(domain, watchdog):
                print("paused", flush=True)
                time.sleep(60)
            """,
        )
        assert process.stdout
        assert process.stdout.readline() == "paused\n"
        own.stop(kill=True)
        process.kill()
        process.wait()
        time.sleep(1)
        own.start()
        wait_until(lambda: made.state() == "running")
