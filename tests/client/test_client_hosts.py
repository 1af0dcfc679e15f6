"""`triptych host`: taking one out of service, and how it is shown."""

from typing import Any

import pytest
from conftest import Triptych
from fake_api import NOW, Fake, problem
from triptych import Client, Problem

DRAIN = "POST /v1/hosts/kvm1/drain"
SHOW = "GET /v1/hosts/kvm1"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.client.time.sleep", lambda seconds: None)


def host(queued: int = 0, running: int = 0, **fields: Any) -> dict[str, Any]:
    """A host that drains and answers, unless told otherwise."""
    return {
        "name": "kvm1",
        "answering": True,
        "silent": False,
        "draining": True,
        "operations": {"queued": queued, "running": running},
        "last_seen_at": NOW,
        "problem": None,
        "reflink": True,
        "free_bytes": 2**40,
        "total_bytes": 2**41,
        "vault_usage": {"copies": 3, "apparent_bytes": 3 * 2**30, "unique_bytes": 2**20},
        **fields,
    }


def drains(api: Fake, *states: dict[str, Any]) -> None:
    api.says(DRAIN, states[0])
    api.goes_through(SHOW, *states)


def test_drain_waits_until_nothing_is_left(api: Fake, triptych: Triptych) -> None:
    """A line for each change on stderr, then what may be done now and how to take it back."""
    drains(api, host(2, 1), host(2, 1), host(0, 1), host())
    run = triptych("host", "drain", "kvm1")
    assert run.code == 0
    assert run.err.splitlines() == [
        "kvm1 is draining: 2 queued and 1 running",
        "kvm1 is draining: 0 queued and 1 running",
        "kvm1 is draining: 0 queued and 0 running",
    ]
    assert "Host kvm1 is drained" in run.out
    assert "Its workers may be stopped now." in run.out
    assert "`triptych host resume kvm1`" in run.out


def test_drain_without_waiting(api: Fake, triptych: Triptych) -> None:
    """`--no-wait` says what is left to do and looks no further."""
    drains(api, host(2, 1))
    run = triptych("host", "drain", "kvm1", "--no-wait")
    assert (run.code, run.out) == (0, "Host kvm1 is draining: 2 queued and 1 running.\n")
    assert api.calls(SHOW) == []


@pytest.mark.parametrize("words", [["--json"], ["--json", "--no-wait"]])
def test_drain_as_json_is_the_host(api: Fake, triptych: Triptych, words: list[str]) -> None:
    """One document, waited for or not."""
    drains(api, host())
    assert host() == triptych("host", "drain", "kvm1", *words).json


def test_drain_of_a_silent_host_is_not_waited_for(api: Fake, triptych: Triptych) -> None:
    """Its work cannot end: that is said at once, with what to do, and the exit code is 1."""
    drains(api, host(3, 1, answering=False, silent=True))
    run = triptych("host", "drain", "kvm1")
    assert (run.code, run.out, len(api.calls(SHOW))) == (1, "", 1)
    assert "silent (last seen " in run.err
    assert "its work cannot end: 3 queued and 1 running" in run.err
    assert "Start its workers and run `triptych host drain kvm1` again" in run.err


def test_silent_host_without_work_is_drained(api: Fake, triptych: Triptych) -> None:
    """Where nothing is left, nobody needs to answer."""
    drains(api, host(answering=False, silent=True))
    assert triptych("host", "drain", "kvm1").code == 0


def test_drain_waits_while_libvirt_is_away(api: Fake, triptych: Triptych) -> None:
    """The workers live and see to it; the problem is shown meanwhile."""
    trouble = host(0, 1, answering=False, problem="libvirt does not answer: gone")
    drains(api, trouble, trouble, host())
    run = triptych("host", "drain", "kvm1")
    assert run.code == 0
    assert "kvm1 is draining, libvirt does not answer: gone: 0 queued and 1 running" in run.err


def test_drain_that_somebody_ends(api: Fake, triptych: Triptych) -> None:
    """Resumed by another hand, the host is not drained, and the exit code says so."""
    drains(api, host(0, 1), host(0, 1, draining=False))
    run = triptych("host", "drain", "kvm1")
    assert (run.code, run.out) == (1, "")
    assert "resumed meanwhile" in run.err


def test_drain_outlives_a_restart_of_the_api(api: Fake) -> None:
    """A gateway's errors while waiting are not the drain's end."""
    drains(api, host(0, 1), host())
    api.stumble = 6
    assert Client().wait_drained("kvm1")["operations"] == {"queued": 0, "running": 0}


def test_drain_of_an_unknown_host(api: Fake) -> None:
    """The SDK raises the API's refusal."""
    api.says(DRAIN, problem(404, "host_not_found", "No host named 'kvm1' has reported."), 404)
    with pytest.raises(Problem) as caught:
        Client().hosts.drain("kvm1")
    assert caught.value.code == "host_not_found"


def test_resume(api: Fake, triptych: Triptych) -> None:
    """It says that the host takes new work, and how it is."""
    api.says("POST /v1/hosts/kvm1/resume", host(draining=False))
    run = triptych("host", "resume", "kvm1")
    assert (run.code, run.out) == (0, "Host kvm1 takes new work. It is answering now.\n")


def test_list_tells_how_hosts_are(api: Fake, triptych: Triptych) -> None:
    """Draining, silence, problem and work of each, a line a host."""
    rows = [
        host(2, 1),
        host(name="kvm2", draining=False, silent=True, last_seen_at=None),
        host(name="kvm3", draining=False, problem="libvirt does not answer: gone"),
        host(name="kvm4", draining=False),
    ]
    api.says("GET /v1/hosts", {"items": rows, "next": None})
    _, one, two, three, four = triptych("host", "list").out.splitlines()
    assert one.split()[:4] == ["kvm1", "draining", "2", "1"]
    assert "silent (never seen)" in two
    assert "libvirt does not answer: gone" in three
    assert four.split()[:4] == ["kvm4", "answering", "0", "0"]


def test_show_begins_with_the_state(api: Fake, triptych: Triptych) -> None:
    """Then follow all the fields that the host has."""
    api.says(SHOW, host(1))
    lines = triptych("host", "show", "kvm1").out.splitlines()
    assert lines[0].split() == ["state", "draining"]
    assert ["operations.queued", "1"] in [line.split() for line in lines]


def test_list_says_what_copies_take_up(api: Fake, triptych: Triptych) -> None:
    """How many there are, what they hold, and what of it is shared with nothing."""
    api.says("GET /v1/hosts", {"items": [host()]})
    assert "3 of 3.0 GiB, own 1.0 MiB" in triptych("host", "list").out
