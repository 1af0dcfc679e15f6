"""The command line: outcomes, exit codes, pure JSON, refusals, confirmation."""

import io
import json
import sys
from typing import Any

import pytest
from conftest import Triptych
from fake_api import NOW, Fake, operation, problem
from triptych.cli.render import duration
from triptych.cli.session import hoist
from triptych.config import config_path

TAKE = "POST /v1/servers/web1/snapshot"
SNAPSHOT = {
    "id": "snp_1",
    "server": "srv_1",
    "taken_at": NOW,
    "expires_at": "2030-01-04T03:04:05Z",
    "with_memory": False,
    "consistency": "file-system",
    "way": "reflink",
    "pause_ms": 11.4,
    "bytes": 10 * 2**30,
    "description": "",
}
IMAGE = {"id": "img_1", "name": "golden", "server": "srv_1", "created_at": NOW} | {
    "state": "complete",
    "way": "stream",
    "consistency": "crash",
    "pause_ms": None,
    "bytes": 2**20,
    "left_out": [{"target": "sda", "reason": "CD-ROM"}],
    "verified": {"at": "2030-01-02T03:04:06Z", "result": "ok"},
    "proof": None,
}


def takes_a_snapshot(api: Fake) -> None:
    running = operation(state="running", phase="cloning disks", progress=40, finished_at=None)
    running |= {"bytes_done": 4 * 2**30, "bytes_total": 10 * 2**30}
    api.starts(TAKE, running, operation(result={"snapshot": "snp_1"}))
    api.says("GET /v1/servers/srv_1/snapshot", SNAPSHOT)


def test_outcome_is_told_in_words(api: Fake, triptych: Triptych) -> None:
    """After a snapshot: where, how, the pause, the consistency, until when, what next."""
    takes_a_snapshot(api)
    run = triptych("snapshot", "take", "web1")
    assert run.code == 0
    for said in (
        "Snapshot of web1 taken on host kvm1 in 2.0 s, by reflink.",
        "paused for 11 ms",
        "file-system consistent",
        "10.0 GiB",
        "kept until 2030-01-04 03:04:05",
        "`triptych snapshot revert web1`",
    ):
        assert said in run.out


def test_without_a_terminal_progress_is_plain_lines_on_stderr(
    api: Fake, triptych: Triptych
) -> None:
    """A log gets a readable line per step, without escape sequences, apart from the result."""
    takes_a_snapshot(api)
    run = triptych("snapshot", "take", "web1")
    assert "op_1: cloning disks, 40 %, 4.0 GiB of 10.0 GiB" in run.err
    assert "\x1b" not in run.err + run.out
    assert len(run.out.splitlines()) == 1


def test_options_of_take_reach_the_api(api: Fake, triptych: Triptych) -> None:
    """Each option of `snapshot take` becomes its field of the request."""
    takes_a_snapshot(api)
    triptych("snapshot", "take", "web1", "--replace", "--with-memory", "--quiesce", "require")
    assert api.calls(TAKE)[0].body == {"replace": True, "with_memory": True, "quiesce": "require"}


@pytest.mark.parametrize("before", [True, False])
def test_json_is_one_document(api: Fake, triptych: Triptych, before: bool) -> None:
    """With --json, before or after the command, stdout is the operation and nothing else."""
    takes_a_snapshot(api)
    words = ["snapshot", "take", "web1"]
    run = triptych(*(["--json", *words] if before else [*words, "--json"]))
    assert run.code == 0
    assert run.json["state"] == "succeeded"


def test_no_wait_prints_the_id_alone(api: Fake, triptych: Triptych) -> None:
    """`--no-wait` gives a script the operation's id at once."""
    takes_a_snapshot(api)
    run = triptych("snapshot", "take", "web1", "--no-wait")
    assert (run.code, run.out, run.err) == (0, "op_1\n", "")
    assert api.calls("GET /v1/operations/op_1") == []


def test_no_wait_with_json_prints_the_operation(api: Fake, triptych: Triptych) -> None:
    """Both together give the operation as it was accepted."""
    takes_a_snapshot(api)
    assert triptych("--json", "--no-wait", "snapshot", "take", "web1").json["state"] == "queued"


def test_failed_operation_exits_1_with_its_reason(api: Fake, triptych: Triptych) -> None:
    """A failure prints code and sentence to stderr, nothing to stdout, and exits 1."""
    error = {"code": "no_space", "message": "12 GiB are needed, 3 GiB are free."}
    api.starts(TAKE, operation(state="failed", error=error))
    run = triptych("snapshot", "take", "web1")
    assert (run.code, run.out) == (1, "")
    assert "error: no_space: 12 GiB are needed, 3 GiB are free." in run.err
    assert "triptych operation show op_1" in run.err


def test_failed_operation_is_still_one_json_document(api: Fake, triptych: Triptych) -> None:
    """With --json a failure is the operation on stdout and exit code 1."""
    api.starts(TAKE, operation(state="failed", error={"code": "x", "message": "y"}))
    run = triptych("snapshot", "take", "web1", "--json")
    assert (run.code, run.json["state"]) == (1, "failed")


def test_refusal_exits_3_and_says_what_to_do(api: Fake, triptych: Triptych) -> None:
    """A second snapshot is refused with code, the API's sentence, and what is in the way."""
    detail = "web1 has a snapshot. Ask with --replace."
    api.says(TAKE, problem(409, "snapshot_exists", detail, conflict="snp_1"), 409)
    run = triptych("snapshot", "take", "web1")
    assert (run.code, run.out) == (3, "")
    assert f"error: snapshot_exists: {detail}" in run.err
    assert "snp_1" in run.err


def test_refusal_is_a_json_problem(api: Fake, triptych: Triptych) -> None:
    """With --json a refusal is the problem document on stdout."""
    api.says(TAKE, problem(409, "snapshot_exists", "web1 has a snapshot."), 409)
    run = triptych("snapshot", "take", "web1", "--json")
    assert (run.code, run.json["code"], run.json["status"]) == (3, "snapshot_exists", 409)


def test_fields_at_fault_are_named(api: Fake, triptych: Triptych) -> None:
    """A 422 names each field and what is wrong with it."""
    errors = [{"loc": ["body", "at"], "msg": "is no time of day"}]
    route = "PUT /v1/servers/web1/schedules/daily"
    api.says(route, problem(422, "invalid", "The request is not valid.", errors=errors), 422)
    run = triptych("schedule", "set", "web1", "daily", "--at", "25:00")
    assert run.code == 3
    assert "at: is no time of day" in run.err


def test_wrong_token_points_to_login(api: Fake, triptych: Triptych) -> None:
    """A 401 says how to log in."""
    api.says("GET /v1/servers", problem(401, "unauthenticated", "No such token."), 401)
    assert "triptych login" in triptych("server", "list").err


def test_unreachable_api_exits_4(triptych: Triptych) -> None:
    """Nothing listening: exit code 4, the URL, what to do, and no traceback."""
    run = triptych("server", "list", "--url", "http://127.0.0.1:9")
    assert (run.code, run.out) == (4, "")
    assert "error: api_unreachable: Cannot reach the Triptych API at http://127.0.0.1:9" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    "words",
    [
        ["snapshot", "grab", "web1"],
        ["snapshot", "take"],
        ["clone", "create", "web1", "--name", "qa", "--count", "101"],
        ["schedule", "set", "web1", "weekly", "--at", "03:00"],
        ["schedule", "set", "web1", "daily", "--at", "03:00", "--weekday", "mon"],
    ],
)
def test_wrong_usage_exits_2_and_sends_nothing(
    api: Fake, triptych: Triptych, words: list[str]
) -> None:
    """What the command line can tell is wrong never reaches the API."""
    run = triptych(*words)
    assert (run.code, run.out) == (2, "")
    assert run.err
    assert api.requests == []


@pytest.mark.parametrize(
    "words",
    [
        ["snapshot", "revert", "web1"],
        ["snapshot", "delete", "web1"],
        ["image", "restore", "golden"],
        ["image", "delete", "golden"],
        ["schedule", "delete", "web1", "daily"],
        ["server", "forget", "web1"],
        ["operation", "undo", "op_1"],
    ],
)
def test_destruction_without_a_terminal_needs_yes(
    api: Fake, triptych: Triptych, words: list[str]
) -> None:
    """A script must say --yes to destroy; without it nothing is sent."""
    run = triptych(*words)
    assert (run.code, run.out) == (2, "")
    assert "--yes" in run.err
    assert api.requests == []


def test_revert_tells_how_to_undo_it(api: Fake, triptych: Triptych) -> None:
    """After a revert the outcome names the command that takes it back, and until when."""
    done = operation(kind="snapshot.revert", undo_until="2030-01-03T03:04:07Z")
    api.starts("POST /v1/servers/web1/snapshot/revert", done)
    run = triptych("snapshot", "revert", "web1", "--yes")
    assert run.code == 0
    assert "web1 is back at its snapshot on host kvm1 in 2.0 s." in run.out
    assert "until 2030-01-03 03:04:07" in run.out
    assert "`triptych operation undo op_1`" in run.out


def test_undo_is_an_operation_of_its_own(api: Fake, triptych: Triptych) -> None:
    """Undo starts and waits for a new operation and names the server."""
    api.starts("POST /v1/operations/op_1/undo", operation("op_2", kind="snapshot.revert.undo"))
    api.says("GET /v1/servers/srv_1", {"id": "srv_1", "name": "web1"})
    run = triptych("operation", "undo", "op_1", "--yes")
    assert (run.code, run.out) == (0, "Undone: web1 is as it was before.\n")


def test_image_names_what_it_left_out(api: Fake, triptych: Triptych) -> None:
    """An image's outcome names the disks that are not in it."""
    done = operation(kind="image.create", result={"image": "img_1"})
    api.starts("POST /v1/servers/web1/images", done)
    api.says("GET /v1/images/img_1", IMAGE)
    run = triptych("image", "create", "web1", "--name", "golden", "--pin")
    assert api.requests[0].body == {"name": "golden", "pinned": True, "quiesce": "auto"}
    assert "Image golden of web1 made on host kvm1 in 2.0 s, as a stream." in run.out
    assert "The guest was not paused." in run.out
    assert "Left out: sda (CD-ROM)." in run.out


def test_failed_boot_proof_exits_1(api: Fake, triptych: Triptych) -> None:
    """A verify that ran but found an image that does not boot is no success."""
    api.starts("POST /v1/images/golden/verify", operation(kind="image.verify"))
    proof = {"at": "2030-01-02T03:04:06Z", "result": "failed", "reason": "no sign of life"}
    api.says("GET /v1/images/golden", IMAGE | {"proof": proof})
    run = triptych("image", "verify", "golden", "--boot")
    assert (run.code, api.requests[0].body) == (1, {"boot": True})
    assert "Boot proof: failed (no sign of life)." in run.err


@pytest.mark.parametrize(("words", "code"), [(["--boot"], 1), ([], 0)])
def test_proof_that_did_not_run_fails_who_asked_for_it(
    api: Fake, triptych: Triptych, words: list[str], code: int
) -> None:
    """`image verify --boot` never passes on a proof that was not run; a plain verify does."""
    api.starts("POST /v1/images/golden/verify", operation(kind="image.verify"))
    proof = {"at": None, "result": "not_run", "reason": "no spare memory"}
    api.says("GET /v1/images/golden", IMAGE | {"proof": proof})
    run = triptych("image", "verify", "golden", *words)
    assert code == run.code
    assert "Boot proof: not run (no spare memory)." in run.out + run.err


IDENTITY = {
    "way": "cloud-init",
    "renewed": ["name"],
    "pending": [{"part": "dhcp", "reason": "by cloud-init"}],
    "kept": [{"part": "hostname", "reason": "no agent"}, {"part": "machine-id", "reason": ""}],
    "left_out": [{"target": "hostdev pci", "reason": "of one guest"}],
}


def test_each_clone_has_its_own_outcome(api: Fake, triptych: Triptych) -> None:
    """One that failed is named with its reason, one that stands with what it shares or is to
    renew, and once for all of them why; exit 1."""
    error = {"code": "name_taken", "message": "qa-002 exists."}
    clones = [
        {"id": "cln_1", "name": "qa-001", "state": "ready", "identity": IDENTITY},
        {"id": "cln_2", "name": "qa-002", "state": "failed", "error": error},
        {"id": "cln_3", "name": "qa-003", "state": "ready", "identity": IDENTITY},
    ]
    done = operation(kind="clone.create", result={"clones": clones})
    api.starts("POST /v1/servers/web1/snapshot/clones", done)
    words = "clone create web1 --from snapshot --count 2 --name qa-{n:03} --no-start"
    run = triptych(*words.split())
    assert (api.requests[0].body) == {
        "name": "qa-{n:03}",
        "count": 2,
        "with_memory": False,
        "start": False,
    }
    assert run.code == 1
    assert "2 of 3 clones of web1 made" in run.err
    for name in ("qa-001", "qa-003"):
        assert (
            f"{name}: ready; still as its source has them: hostname, machine-id; "
            "still to be renewed: dhcp; left out: hostdev pci"
        ) in run.err
    assert "qa-002: failed: name_taken: qa-002 exists." in run.err
    for reason in ("hostname: no agent", "dhcp: by cloud-init", "hostdev pci: of one guest"):
        assert run.err.count(reason) == 1


def test_clone_tells_what_is_not_its_own(api: Fake, triptych: Triptych) -> None:
    """Each part that was not renewed, or that it goes without, with the reason."""
    api.says("GET /v1/clones/qa-001", {"id": "cln_1", "name": "qa-001", "identity": IDENTITY})
    told = triptych("clone", "show", "qa-001").out
    assert "hostname (no agent); machine-id" in told
    assert "dhcp (by cloud-init)" in told
    assert "hostdev pci (of one guest)" in told


def test_linked_clones_name_what_must_stay(api: Fake, triptych: Triptych) -> None:
    """The file that they stand on, once; or why there is none."""
    base = "/srv/vms/triptych-base-op_1-vda.raw"
    clones = [
        {"id": f"cln_{n}", "name": f"qa-{n}", "state": "ready", "linked_to": [base]} for n in (1, 2)
    ]
    done = operation(kind="clone.create", result={"clones": clones})
    api.starts("POST /v1/servers/web1/clones", done)
    words = "clone create web1 --count 2 --name qa-{n} --first 4 --linked --quiesce never"
    run = triptych(*words.split())
    asked = api.requests[0].body
    assert (run.code, asked["linked"], asked["quiesce"]) == (0, True, "never")
    assert asked["first"] == 4
    assert run.out.count(base) == 1

    for each in clones:
        each["linked_to"] = []
    result = {"clones": clones, "not_linked": "every disk shares its extents"}
    api.starts("POST /v1/servers/web1/clones", operation(kind="clone.create", result=result))
    assert "Not linked: every disk shares its extents." in triptych(*words.split()).out


def test_only_host_need_not_be_named(api: Fake, triptych: Triptych) -> None:
    """Where one host exists, `server add DOMAIN` is enough."""
    api.says("GET /v1/hosts", {"items": [{"name": "kvm1"}], "next": None})
    api.says("POST /v1/servers", {"id": "srv_1", "name": "web1", "host": "kvm1"}, 201)
    run = triptych("server", "add", "web1")
    assert (run.code, api.requests[1].body) == (0, {"host": "kvm1", "domain": "web1"})


def test_several_hosts_are_listed_to_choose_from(api: Fake, triptych: Triptych) -> None:
    """Where several exist, the error names them."""
    api.says("GET /v1/hosts", {"items": [{"name": "kvm1"}, {"name": "kvm2"}], "next": None})
    run = triptych("server", "add", "web1")
    assert run.code == 2
    assert "--host: kvm1, kvm2" in run.err


def test_table_without_a_terminal_keeps_each_row_on_its_line(api: Fake, triptych: Triptych) -> None:
    """Piped tables are neither wrapped nor cut, however long a value is."""
    long = "a-rather-long-name-" * 10
    rows = [{"id": "srv_1", "name": long, "host": "kvm1"}, {"id": "srv_2", "name": "b"}]
    api.says("GET /v1/servers", {"items": rows, "next": None})
    lines = triptych("server", "list").out.splitlines()
    assert len(lines) == 3
    assert long in lines[1]
    assert all(line == line.rstrip() for line in lines)


def test_list_as_json_keeps_the_api_s_form(api: Fake, triptych: Triptych) -> None:
    """Lists are `{"items", "next"}` with --json, an empty one too."""
    api.says("GET /v1/servers", {"items": [], "next": None})
    assert triptych("server", "list", "--json").json == {"items": [], "next": None}


def test_operations_can_be_filtered_by_state(api: Fake, triptych: Triptych) -> None:
    """`--state` shows those in that state only."""
    rows = [operation("op_1"), operation("op_2", state="running")]
    api.says("GET /v1/operations", {"items": rows, "next": None})
    found = triptych("operation", "list", "--state", "running", "--json").json
    assert [each["id"] for each in found["items"]] == ["op_2"]


def test_schedule_is_set_with_all_it_was_given(api: Fake, triptych: Triptych) -> None:
    """`schedule set` sends every value and answers with the schedule in a sentence."""
    answer = {"kind": "weekly", "at": "03:00", "weekday": "mon", "timezone": "Europe/London"} | {
        "keep": 7,
        "enabled": True,
        "next_run_at": "2030-07-01T02:00:00Z",
        "failures_in_row": 4,
    }
    api.says("PUT /v1/servers/web1/schedules/weekly", answer, 201)
    words = "schedule set web1 weekly --at 03:00 --timezone Europe/London --weekday mon"
    run = triptych(*words.split(), "--catch-up", "3600", "--require", "verified")
    [sent] = api.calls("PUT /v1/servers/web1/schedules/weekly")
    assert sent.query == {}
    assert sent.body == {
        "at": "03:00",
        "timezone": "Europe/London",
        "keep": 7,
        "weekday": "mon",
        "require": "verified",
    } | {
        "enabled": True,
        "catch_up": 3600,
    }
    assert "next run 2030-07-01 03:00:00 BST" in run.out
    assert "4 FAILED IN A ROW" in run.out


DAILY = "/v1/servers/web1/schedules/daily"


def keeping(keep: int, *going: str) -> dict[str, Any]:
    """A daily schedule, and the images that go with its next run."""
    images = [{"id": f"img_{name}", "name": name, "created_at": NOW} for name in going]
    shown = {"kind": "daily", "at": "03:00", "timezone": "UTC", "keep": keep, "enabled": True}
    return {**shown, "goes_next": images}


def test_fewer_images_are_asked_about(
    api: Fake, triptych: Triptych, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeping fewer names those that go beside those which go anyway; refused, nothing is set."""
    api.says(f"GET {DAILY}", keeping(7, "oldest"))
    api.says(f"PUT {DAILY}", keeping(5, "oldest", "second", "third"))
    asked: list[str] = []

    def no(question: str, **_: Any) -> bool:
        asked.append(question)
        return False

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", no)
    run = triptych("schedule", "set", "web1", "daily", "--at", "03:00", "--keep", "5")
    assert (run.code, run.out) == (2, "")
    [question] = asked
    assert "2 images go more with the next run" in question
    assert "second" in question
    assert "oldest" not in question
    assert [each.query for each in api.calls(f"PUT {DAILY}")] == [{"dry_run": "true"}]


def test_fewer_images_in_a_script_need_yes(api: Fake, triptych: Triptych) -> None:
    """Without a terminal --yes agrees; where no image goes for it nothing needs agreement."""
    api.says(f"GET {DAILY}", keeping(7))
    api.says(f"PUT {DAILY}", keeping(5, "second"))
    words = ["schedule", "set", "web1", "daily", "--at", "03:00", "--keep", "5"]
    run = triptych(*words)
    assert (run.code, "--yes" in run.err) == (2, True)
    assert triptych(*words, "--yes").code == 0
    api.says(f"PUT {DAILY}", keeping(5))
    assert triptych(*words).code == 0
    assert api.requests[-1].query == {}


def test_dry_run_sets_nothing(api: Fake, triptych: Triptych) -> None:
    """It says what would be set and which images would go; one request, marked as such."""
    api.says(f"PUT {DAILY}", keeping(1, "oldest", "second"))
    run = triptych("schedule", "set", "web1", "daily", "--at", "03:00", "--keep", "1", "--dry-run")
    assert [each.query for each in api.requests] == [{"dry_run": "true"}]
    assert run.out.startswith("Would be set: web1 daily at 03:00 UTC, keeping 1.")
    assert "With the next run 2 images go: oldest (" in run.out


def test_list_of_unprotected_servers(api: Fake, triptych: Triptych) -> None:
    """It asks the API for those alone; none is good news."""
    api.says("GET /v1/servers", {"items": [], "next": None})
    run = triptych("server", "list", "--unprotected")
    assert api.requests[0].query["unprotected"] == "true"
    assert "Every server with a schedule" in run.err
    triptych("server", "list")
    assert "unprotected" not in api.requests[1].query


def test_forgetting_tells_what_stays(api: Fake, triptych: Triptych) -> None:
    """The images, how to see them, and the schedules that ended."""
    answer = {"id": "srv_1", "name": "web1", "images_kept": 3, "images_kept_bytes": 3 * 2**30}
    api.says("DELETE /v1/servers/web1", answer | {"schedules_ended": ["daily", "weekly"]})
    out = triptych("server", "forget", "web1", "--yes").out
    assert "its daily and weekly schedule" in out
    assert "3 images stay (3.0 GiB): triptych image list srv_1" in out
    document = triptych("server", "forget", "web1", "--yes", "--json").out
    assert json.loads(document)["images_kept"] == 3


def test_schedule_show_tells_which_of_two_is_set(api: Fake, triptych: Triptych) -> None:
    """A schedule that is not set is no error; a server that does not exist is."""
    daily = {"kind": "daily", "at": "03:00", "timezone": "UTC", "keep": 7, "enabled": False}
    api.says("GET /v1/servers/web1/schedules/daily", daily)
    run = triptych("schedule", "show", "web1")
    assert (run.code, run.out) == (0, "web1 daily at 03:00 UTC, keeping 7: disabled.\n")
    assert triptych("schedule", "show", "nobody").code == 3


def test_runs_show_what_comes_and_what_came(api: Fake, triptych: Triptych) -> None:
    """Runs list the upcoming slots and the past ones with reason and lateness."""
    past = {"slot": "2029-12-31T03:00:00Z", "state": "skipped", "reason": "service down"}
    answer = {"upcoming": [{"slot": "2099-01-01T03:00:00Z"}], "items": [past | {"lateness_s": 0}]}
    api.says("GET /v1/servers/web1/schedules/daily/runs", answer)
    lines = triptych("schedule", "runs", "web1", "daily").out.splitlines()
    assert "scheduled" in lines[1]
    assert "2099-01-01" in lines[1]
    assert lines[2].endswith("service down")


def test_followed_events_are_json_lines(
    api: Fake, triptych: Triptych, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`events --follow --json` prints one event a line."""
    events = [{"type": "triptych.snapshot.taken", "subject": "web1"}, {"type": "b"}]
    monkeypatch.setattr("triptych.client.Client.follow", lambda *_: iter(events))
    run = triptych("events", "--follow", "--json")
    assert events == [json.loads(line) for line in run.out.splitlines()]


def test_words_from_a_guest_do_not_steer_the_terminal(api: Fake, triptych: Triptych) -> None:
    """Control characters and markup in a description are shown as text."""
    evil = SNAPSHOT | {"description": "\x1b[2J[red]boo[/red]"}
    api.says("GET /v1/servers/web1/snapshot", evil)
    run = triptych("snapshot", "show", "web1")
    assert "\x1b" not in run.out
    assert "[red]boo[/red]" in run.out


def test_login_checks_then_stores(
    api: Fake, triptych: Triptych, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`login` tries the token it read from standard input, and later commands use it."""
    api.says("GET /v1/servers", {"items": [], "next": None})
    monkeypatch.delenv("TRIPTYCH_TOKEN")
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped\n"))
    assert triptych("login", api.url + "/").code == 0
    monkeypatch.delenv("TRIPTYCH_URL")
    assert triptych("server", "list").code == 0
    assert [each.headers["authorization"] for each in api.requests] == ["Bearer piped"] * 2


def test_login_with_a_wrong_token_stores_nothing(api: Fake, triptych: Triptych) -> None:
    """A refused token leaves no login file behind."""
    api.says("GET /v1/servers", problem(401, "unauthenticated", "No such token."), 401)
    assert triptych("login", api.url, "--token", "wrong").code == 3
    assert not config_path().exists()


def test_cancel_waits_until_it_is_so(api: Fake, triptych: Triptych) -> None:
    """`operation cancel` tells the state that the operation ended in."""
    api.says("POST /v1/operations/op_1/cancel", operation(state="running"), 202)
    api.goes_through(
        "GET /v1/operations/op_1", operation(state="running"), operation(state="cancelled")
    )
    run = triptych("operation", "cancel", "op_1")
    assert (run.code, run.out) == (0, "Operation op_1 is cancelled.\n")


def test_unexpected_bug_is_no_traceback(
    api: Fake, triptych: Triptych, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a defect of the client itself ends in a sentence."""

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("triptych.nouns.Servers.list", broken)
    run = triptych("server", "list")
    assert run.code == 70
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("given", "hoisted"),
    [
        (["server", "list", "--json"], ["--json", "server", "list"]),
        (["events", "--url", "http://a"], ["--url", "http://a", "events"]),
        (["events", "--token=t", "-f"], ["--token=t", "events", "-f"]),
        (["snapshot", "take", "--", "--json"], ["snapshot", "take", "--", "--json"]),
    ],
)
def test_global_options_may_stand_anywhere(given: list[str], hoisted: list[str]) -> None:
    """Global options move to the front; what follows `--` stays where it is."""
    assert hoisted == hoist(given)[0]


def test_every_command_has_a_summary_in_its_help(triptych: Triptych) -> None:
    """`--help` of each command names its purpose and its global options."""
    from triptych.cli.app import app

    for noun in app.registered_groups:
        assert noun.typer_instance
        for each in noun.typer_instance.registered_commands:
            run = triptych(str(noun.name), str(each.name), "--help")
            assert run.code == 0
            assert each.callback
            assert each.callback.__doc__
            assert "Also takes --json" in run.out


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (12, "12 s"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (3600 * 24 - 1, "1 d"),
        (3600 * 48 - 5, "2 d"),
        (3600 * 50, "2 d 2 h"),
    ],
)
def test_durations_are_two_units_at_most(seconds: float, words: str) -> None:
    """Durations are told in the units that a person would choose."""
    assert words == duration(seconds)
