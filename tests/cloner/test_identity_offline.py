"""What becomes of a clone when guestfish does its work, complains, hangs or is cancelled.

A script stands in for guestfish here; tests/guests has the real one change a real Debian.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from operations.waiting import wait_for

from services.cloner.identity import offline
from services.cloner.identity.offline import Offline
from services.cloner.identity.report import Renewal
from shared.errors import Cancelled, IdentityNotRenewed

PARTS = ["hostname", "machine-id", "ssh-host-keys"]
DEFINITION = """<domain type='qemu'><name>c</name><uuid>6c2d0d3e-6f0c-4f0e-8f4e-1f4b5e4a7a11</uuid>
<memory>1</memory><devices>
  <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/c-vda.qcow2'/>
    <target dev='vda' bus='virtio'/></disk>
  <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/d/tools.raw'/>
    <target dev='vdb' bus='virtio'/><readonly/></disk>
</devices></domain>"""
GUESTFISH = """\
#!/bin/sh
cd {folder}
echo "$LIBGUESTFS_BACKEND $LIBGUESTFS_BACKEND_SETTINGS: $*" >>started
echo "$LIBGUESTFS_TMPDIR" >>temporary
mktemp -d "${{LIBGUESTFS_TMPDIR:-.}}/libguestfsXXXXXX" >>made
mktemp -d sockets-XXXXXX >socket
{first}
while read -r word rest; do
    echo "$word $rest" >>told
    case $word in
        echo) echo "$rest" ;;
        command) {command} ;;
    esac
done
rm -r "$(cat socket)"
"""
HANGS = "sleep 1000 & echo $! >hangs; wait"
#: It does not even end when it has nothing to wait for.
HANGS_ITSELF = "while :; do sleep 1000 & echo $! >hangs; wait; done"
#: The system on the disks: what it is told to be, it is.
SYSTEM = """\
set -- $rest
case $3 in
    renew) host=$4 id=${5%'"'} key=new ;;
    look*) printf '%s\\t%s\\n' kernel Linux stored-hostname "${host:-golden}" \\
        machine-id "${id:-0}" ssh-host-key "${key:-old}" ;;
esac"""
#: How libguestfs 1.48 says that it found no system, and that its machine did not come up.
NO_SYSTEM = """\
cat >&2 <<END
libguestfs: warning: the disk is rather small
guestfish: no operating system was found on this disk

If using guestfish '-i' option, remove this option and instead
use the commands 'run' followed by 'list-filesystems'.
(see the virt tool manual page).
END
exit 1"""
NO_MACHINE = """\
cat >&2 <<END
*stdin*:1: libguestfs: error: appliance closed the connection unexpectedly.
This usually means the libguestfs appliance crashed.
*stdin*:1: libguestfs: error: guestfs_launch failed.
into a bug report or message to the libguestfs mailing list.
END
exit 1"""

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a guestfish on PATH that does `first`, and `command` when told to run one; gives the
    directory with what it was `told`. The host has no KVM. Time stands still until it hangs:
    patience is lost with that alone, not with a slow machine."""
    began, hangs = time.monotonic(), tmp_path / "hangs"

    def clock() -> float:
        return time.monotonic() if hangs.exists() and hangs.stat().st_size else began

    monkeypatch.setattr(offline, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    monkeypatch.setattr(offline, "_KVM", tmp_path / "kvm")
    monkeypatch.setattr(offline, "_found", None)
    monkeypatch.delenv("LIBGUESTFS_BACKEND_SETTINGS", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(first: str = "", command: str = ":") -> Path:
        script = tmp_path / "guestfish"
        script.write_text(GUESTFISH.format(folder=tmp_path, first=first, command=command))
        script.chmod(0o755)
        return tmp_path

    return make


def edit(required: bool = False, check: Callable[[], None] = lambda: None) -> Renewal:
    way = Offline("web_1", Path("/d"), required, check)
    domain: Any = SimpleNamespace(definition=lambda: DEFINITION)
    way.before_start(domain)
    return way.renewal


def gone(pid: str) -> bool:
    """Whether the process is no more, or only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_is_on_the_clones_own_disks_is_changed_and_read_back(fake: Fake) -> None:
    """Its writable disks, by their format; nothing of ours is left on them, all is written out."""
    folder = fake(command=SYSTEM)

    assert edit() == Renewal(way="offline", hostname="web-1", renewed=PARTS)

    started = "direct : --rw --format=qcow2 -a /d/c-vda.qcow2 -i\n"
    assert (folder / "started").read_text() == started
    told = (folder / "told").read_text().splitlines()[::2]
    assert told[-3:] == ["rm-f /triptych-renew.sh", "umount-all ", "shutdown "]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (NO_SYSTEM, "guestfish: no operating system was found on this disk"),
        (NO_MACHINE, "libguestfs: error: appliance closed the connection unexpectedly."),
        ("echo oh; echo dear >&2; kill -9 $$", "dear"),
        ("exit 0", "without a word"),
    ],
)
def test_a_guestfish_that_ends_is_quoted(fake: Fake, first: str, reason: str) -> None:
    """All parts are kept, with its complaint and not the advice that follows; asked for, the
    clone fails."""
    fake(first)

    renewal = edit()

    assert (renewal.way, renewal.renewed) == ("offline", [])
    assert [part for part, _ in renewal.kept] == PARTS
    assert all(why.endswith(reason) for _, why in renewal.kept)
    with pytest.raises(IdentityNotRenewed, match="libguestfs could not change its disks"):
        edit(required=True)


@pytest.mark.parametrize(
    ("first", "command", "sockets"),
    [
        ("", SYSTEM, 0),  # did its work
        ("", HANGS, 0),
        (HANGS, ":", 0),
        (HANGS_ITSELF, ":", 1),  # nobody but it knows where they are
    ],
)
def test_nothing_of_its_own_is_left_behind(
    fake: Fake, first: str, command: str, sockets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a directory for its files that goes with it, and the time to remove its sockets,
    which are elsewhere; the machine that it keeps for the next clone stays where it is."""
    monkeypatch.setattr(offline, "_PATIENCE_S", 3)
    monkeypatch.setattr(offline, "_TIDY_S", 30 if not sockets else 1)
    monkeypatch.setenv("LIBGUESTFS_CACHEDIR", "/kept")
    folder = fake(f'echo "$LIBGUESTFS_CACHEDIR" >kept; {first}', command)

    edit()

    (temporary,) = (folder / "temporary").read_text().splitlines()
    (made,) = (folder / "made").read_text().splitlines()
    assert Path(made).parent == Path(temporary)
    assert not Path(temporary).exists()
    assert len(list(folder.glob("sockets-*"))) == sockets
    assert (folder / "kept").read_text() == "/kept\n"


@pytest.mark.parametrize("where", ["first", "command"])
def test_one_that_hangs_is_ended_with_all_that_it_started(
    fake: Fake, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clone is started next: QEMU must not have its disks open any more."""
    monkeypatch.setattr(offline, "_PATIENCE_S", 3)
    folder = fake(**{where: HANGS})

    renewal = edit()

    assert [part for part, _ in renewal.kept] == PARTS
    assert "longer than 3 s" in renewal.kept[0][1]
    assert gone((folder / "hangs").read_text().strip())


def test_a_cancel_ends_it_at_once(fake: Fake) -> None:
    """Within the five seconds that a cancel may take, and nothing is left running."""
    folder = fake(HANGS)

    def check() -> None:
        if (folder / "hangs").exists():
            raise Cancelled("Cancelled.")

    began = time.monotonic()
    with pytest.raises(Cancelled):
        edit(check=check)

    assert time.monotonic() - began < 5
    assert gone((folder / "hangs").read_text().strip())


def test_a_worker_that_dies_takes_it_along(fake: Fake) -> None:
    """What is done for a dead worker's clone would go on while another one makes it anew."""
    folder = fake("echo $$ >hangs; exec sleep 1000")
    code = (
        "from services.cloner.identity import offline\n"
        "with offline._guestfish([], lambda: None, {}) as session: session.tell('run')"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as worker:
        pid = wait_for(lambda: (folder / "hangs").exists() and (folder / "hangs").read_text())
        worker.send_signal(signal.SIGKILL)

    assert wait_for(lambda: gone(pid.strip()))


@pytest.mark.parametrize(
    ("first", "settings"),
    [
        ("", ["", ""]),
        (f'[ -n "$LIBGUESTFS_BACKEND_SETTINGS" ] || {{ {HANGS}; }}', ["", "force_tcg"]),
        ('[ -n "$LIBGUESTFS_BACKEND_SETTINGS" ] || exit 1', ["", "force_tcg"]),
    ],
)
def test_kvm_is_used_where_libguestfs_comes_up_with_it(
    fake: Fake, first: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /dev/kvm that opens is no proof: where the machine hangs or dies, it is emulated. That is
    found out once."""
    monkeypatch.setattr(offline, "_KVM_PATIENCE_S", 3)
    folder = fake(first, SYSTEM)
    (folder / "kvm").touch()

    assert [edit().renewed, edit().renewed] == [PARTS, PARTS]

    lines = (folder / "started").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"direct {each}" for each in (*settings, settings[-1])
    ]


def test_what_the_operator_says_of_kvm_counts(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LIBGUESTFS_BACKEND_SETTINGS in the worker's environment nothing is tried out."""
    folder = fake(command=SYSTEM)
    (folder / "kvm").touch()
    monkeypatch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")

    assert edit().renewed == PARTS

    assert (folder / "started").read_text().startswith("direct force_tcg: --rw ")
