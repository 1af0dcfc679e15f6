"""Farms on the command line: each clone's outcome, the end, and what asks before it destroys."""

from typing import Any

import pytest
from conftest import Triptych
from fake_api import NOW, Fake, operation

PATH = "/v1/farms/qa-%7Bn%7D"
FARM: dict[str, Any] = {
    "id": "frm_1",
    "name": "qa-{n}",
    "host": "kvm1",
    "source": {"kind": "image", "id": "img_1"},
    "created_at": NOW,
    "expires_in_h": 8,
    "expires_at": "2030-01-02T11:04:05Z",
    "clones": {"ready": 2, "failed": 1},
    "power": {"running": 2},
    "operation": "op_1",
}


def clone(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"cln_{number}", "name": f"qa-{number}", "state": "ready", "error": None} | fields


def starts(api: Fake, method: str, path: str, done: dict[str, Any]) -> None:
    api.starts(f"{method} {PATH}{path}", done)


@pytest.mark.parametrize(("ttl", "hours"), [("8h", 8), ("90m", 1.5), ("3d", 72), ("0.5h", 0.5)])
def test_ttl_is_sent_in_hours(api: Fake, triptych: Triptych, ttl: str, hours: float) -> None:
    """However it is said."""
    done = operation(kind="clone.create", result={"farm": "frm_1", "clones": [clone(1)]})
    api.starts("POST /v1/images/golden/clones", done)
    run = triptych(*f"clone create golden --from image --name qa --ttl {ttl}".split())
    assert (run.code, api.requests[0].body["expires_in_h"]) == (0, hours)


@pytest.mark.parametrize("ttl", ["8", "eight hours", "-8h", "8h30"])
def test_ttl_that_is_none(api: Fake, triptych: Triptych, ttl: str) -> None:
    """Refused here; a bare number might be minutes or days."""
    run = triptych("clone", "create", "golden", "--name", "qa", f"--ttl={ttl}")
    assert (run.code, api.requests) == (2, [])


def test_clones_that_failed_can_be_retried(api: Fake, triptych: Triptych) -> None:
    """The outcome says how."""
    error = {"code": "insufficient_space", "message": "No room."}
    clones = [clone(1), clone(2, state="failed", error=error)]
    done = operation(kind="clone.create", result={"farm": "frm_1", "clones": clones})
    api.starts("POST /v1/servers/web1/clones", done)
    run = triptych("clone", "create", "web1", "--name", "qa-{n}", "--count", "2")
    assert run.code == 1
    assert "triptych farm retry frm_1" in run.err


def test_list_and_show(api: Fake, triptych: Triptych) -> None:
    """How many there are and run, when it ends, and each clone with its error."""
    api.says("GET /v1/farms", {"items": [FARM], "next": None})
    error = {"code": "insufficient_space", "message": "No room."}
    api.says(f"GET {PATH}", FARM | {"items": [clone(1), clone(2, state="failed", error=error)]})
    listed = triptych("farm", "list").out
    assert "2 ready, 1 failed" in listed
    assert "2030-01-02 11:04:05" in listed
    shown = triptych("farm", "show", "qa-{n}").out
    assert "image img_1" in shown
    assert "insufficient_space: No room." in shown


def test_start_and_stop(api: Fake, triptych: Triptych) -> None:
    """Options reach the API; one clone that is still on makes the exit 1."""
    starts(api, "POST", "/start", operation(kind="farm.start", result={"clones": [clone(1)]}))
    assert triptych("farm", "start", "qa-{n}").code == 0
    error = {"code": "guest_still_on", "message": "qa-2 did not shut down."}
    clones = [clone(1, power="stopped", forced=True), clone(2, state="failed", error=error)]
    starts(api, "POST", "/stop", operation(kind="farm.stop", result={"clones": clones}))
    run = triptych("farm", "stop", "qa-{n}", "--timeout", "30", "--force")
    assert run.code == 1
    assert "1 of 2 clones of qa-{n} stopped" in run.err
    assert "qa-1: stopped, its power was cut" in run.err
    assert "qa-2: failed: guest_still_on" in run.err
    assert api.calls(f"POST {PATH}/stop")[0].body == {"timeout_s": 30, "force": True}


def test_retry_tells_the_instant(api: Fake, triptych: Triptych) -> None:
    """Where a server was copied anew, these clones are of another instant than the others."""
    result = {"farm": "frm_1", "clones": [clone(2)], "taken_at": "2030-01-05T06:07:08Z"}
    starts(api, "POST", "/retry", operation(kind="farm.retry", result=result))
    run = triptych("farm", "retry", "qa-{n}")
    assert run.code == 0
    assert "1 clone of qa-{n} made again" in run.out
    assert "2030-01-05 06:07:08" in run.out


def test_delete_names_what_it_left(api: Fake, triptych: Triptych) -> None:
    """Disks that stay, images that stay, and the snapshot that went."""
    left = [{"path": "/srv/data.raw", "reason": "the domain got it later"}]
    gone = clone(1, state="deleted", left=left, snapshot="snp_1", images_kept=2)
    result = {"farm": "frm_1", "clones": [gone]}
    starts(api, "DELETE", "", operation(kind="farm.delete", result=result))
    run = triptych("farm", "delete", "qa-{n}", "--yes")
    assert run.code == 0
    for said in (
        "1 clone of qa-{n} deleted",
        "its snapshot is deleted too",
        "2 images of it kept",
        "left /srv/data.raw (the domain got it later)",
    ):
        assert said in run.out
    api.starts("DELETE /v1/clones/qa-1", operation(kind="clone.delete", result=result))
    assert "1 clone of qa-1 deleted" in triptych("clone", "delete", "qa-1", "--yes").out


@pytest.mark.parametrize("words", [["farm", "delete", "qa-{n}"], ["clone", "delete", "qa-1"]])
def test_deletion_needs_a_word(api: Fake, triptych: Triptych, words: list[str]) -> None:
    """Without a terminal, --yes."""
    run = triptych(*words)
    assert (run.code, api.requests) == (2, [])
    assert "--yes" in run.err


def test_extend(api: Fake, triptych: Triptych) -> None:
    """To a time from now, or to none; one of the two must be said."""
    api.says(f"PATCH {PATH}", FARM)
    run = triptych("farm", "extend", "qa-{n}", "--ttl", "4h")
    assert "Farm qa-{n} ends: 2030-01-02 11:04:05" in run.out
    api.says(f"PATCH {PATH}", FARM | {"expires_at": None, "expires_in_h": None})
    assert "never by itself" in triptych("farm", "extend", "qa-{n}", "--never").out
    sent = [each.body for each in api.calls(f"PATCH {PATH}")]
    assert sent == [{"expires_in_h": 4}, {"expires_in_h": None}]
    for words in ([], ["--ttl", "4h", "--never"]):
        run = triptych("farm", "extend", "qa-{n}", *words)
        assert (run.code, "ttl_missing" in run.err) == (2, True)
