"""The SDK: retries, keys, waiting, pages, streams, and where URL and token come from."""

import json
import time
from pathlib import Path

import pytest
import triptych
from fake_api import Fake, operation, problem
from triptych import Client, NotConfigured, OperationFailed, Problem, Unreachable, client
from triptych.config import Access, config_path, save_login

TAKE = "POST /v1/servers/web1/snapshot"


def test_long_work_is_asked_for_with_a_fresh_key_each_time(api: Fake) -> None:
    """Two calls are two wishes: each has an Idempotency-Key of its own."""
    api.says(TAKE, operation(), 202)
    sdk = Client()
    sdk.snapshots.take("web1")
    sdk.snapshots.take("web1")
    first, second = (each.key for each in api.calls(TAKE))
    assert first
    assert second
    assert first != second


def test_cut_off_request_is_repeated_with_the_same_key(api: Fake) -> None:
    """A connection lost after the request was read leads to one operation, not two."""
    api.says(TAKE, operation(), 202)
    api.drop = 2
    assert Client().snapshots.take("web1")["id"] == "op_1"
    keys = [each.key for each in api.calls(TAKE)]
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_delete_that_is_long_work_is_repeated_with_its_key(api: Fake) -> None:
    """Deleting an image is an operation too: a lost answer does not start a second one."""
    api.says("DELETE /v1/images/golden", operation(kind="image.delete"), 202)
    api.drop = 1
    Client().images.delete("golden")
    keys = {each.key for each in api.calls("DELETE /v1/images/golden")}
    assert len(keys) == 1
    assert None not in keys


def test_gateway_error_is_repeated(api: Fake) -> None:
    """A 502 from a proxy in front of a restarting API is tried again."""
    api.says(TAKE, operation(), 202)
    api.stumble = 1
    assert Client().snapshots.take("web1")["id"] == "op_1"
    assert len(api.calls(TAKE)) == 2


def test_registration_is_not_repeated_once_it_was_sent(api: Fake) -> None:
    """What has no key and may have been done is not done twice."""
    api.drop = 1
    with pytest.raises(Unreachable):
        Client().servers.add("kvm1", "web1")
    assert len(api.calls("POST /v1/servers")) == 1


def test_problem_carries_the_api_s_fields(api: Fake) -> None:
    """A refusal arrives with status, code, title, detail, operation and conflict."""
    body = problem(409, "snapshot_exists", "There is one.", operation="op_9", conflict="snp_1")
    api.says(TAKE, body, 409)
    with pytest.raises(Problem) as caught:
        Client().snapshots.take("web1")
    found = caught.value
    assert (
        found.status,
        found.code,
        found.detail,
        found.operation,
        found.conflict,
    ) == (409, "snapshot_exists", "There is one.", "op_9", "snp_1")
    assert len(api.calls(TAKE)) == 1


def test_answer_of_something_else_names_the_url(api: Fake) -> None:
    """An address where something other than Triptych answers is told as such."""
    api.says("GET /v1/hosts", "<html>Welcome to nginx</html>")
    with pytest.raises(Problem) as caught:
        Client().hosts.list()
    assert caught.value.code == "unexpected_answer"
    assert api.url in caught.value.detail


def test_refused_connection_is_api_unreachable() -> None:
    """Nothing listening is told with the URL and what to do, never as a bare socket error."""
    with pytest.raises(Unreachable) as caught:
        Client("http://127.0.0.1:9").servers.list()
    assert caught.value.code == "api_unreachable"
    assert "http://127.0.0.1:9: connection refused" in caught.value.detail
    assert "TRIPTYCH_URL" in caught.value.detail


def test_wait_looks_until_the_end_and_shows_each_state(api: Fake) -> None:
    """`wait` long-polls, reports every state it saw and returns the last."""
    states = [
        operation(state="queued", progress=0),
        operation(state="running", progress=40),
        operation(result={"snapshot": "snp_1"}),
    ]
    api.goes_through("GET /v1/operations/op_1", *states)
    seen: list[str] = []
    ended = Client().wait("op_1", lambda each: seen.append(each["state"]), poll=0.01)
    assert seen == ["queued", "running", "succeeded"]
    assert ended["result"] == {"snapshot": "snp_1"}


def test_wait_asks_the_api_to_hold_its_answer(api: Fake) -> None:
    """Without a progress callback the API is asked to hold its answer for 30 seconds."""
    running = operation(state="running")
    api.goes_through("GET /v1/operations/op_1", running, operation())
    Client().wait("op_1")
    queries = [each.query for each in api.calls("GET /v1/operations/op_1")]
    assert queries == [{}, {"wait": "30"}]


def test_wait_does_not_flood_an_api_that_answers_at_once(api: Fake) -> None:
    """Where `wait` is ignored by the other side, looks are still a second apart at most often."""
    running = operation(state="running")
    api.goes_through("GET /v1/operations/op_1", running, running, operation())
    began = time.monotonic()
    Client().wait("op_1", poll=0.3)
    assert time.monotonic() - began >= 0.3


def test_wait_outlives_an_api_restart(api: Fake) -> None:
    """An API that is away for a moment does not end the waiting."""
    api.goes_through("GET /v1/operations/op_1", operation())
    api.drop = 9
    assert Client().wait("op_1")["state"] == "succeeded"


def test_wait_gives_up_naming_the_operation(api: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API that stays away ends the waiting, and the error says which operation goes on."""
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    api.drop = 1000
    with pytest.raises(Unreachable) as caught:
        Client().wait("op_1")
    assert caught.value.operation == "op_1"


def test_wait_has_a_timeout(api: Fake) -> None:
    """`timeout` ends the waiting of an operation that does not end."""
    api.says("GET /v1/operations/op_1", operation(state="running"))
    with pytest.raises(TimeoutError):
        Client().wait("op_1", poll=0.01, timeout=0.03)


def test_wait_keeps_its_timeout_while_the_api_holds_its_answer(api: Fake) -> None:
    """The API is asked to hold it for no longer than is left."""
    api.says("GET /v1/operations/op_1", operation(state="running"))
    with pytest.raises(TimeoutError):
        Client().wait("op_1", timeout=1)
    held = [float(each.query.get("wait", 0)) for each in api.calls("GET /v1/operations/op_1")]
    assert 0 < max(held) <= 1


def test_wait_with_check_raises_what_went_wrong(api: Fake) -> None:
    """`check=True` turns a failed operation into an exception with its code."""
    error = {"code": "no_space", "message": "Too little room."}
    api.says("GET /v1/operations/op_1", operation(state="failed", error=error))
    with pytest.raises(OperationFailed) as caught:
        Client().wait("op_1", check=True)
    assert (caught.value.code, caught.value.operation) == ("no_space", "op_1")


def test_lists_follow_the_cursor(api: Fake) -> None:
    """A list is whole, however many pages it comes in."""
    api.goes_through(
        "GET /v1/servers",
        {"items": [{"id": "srv_1"}], "next": "c1"},
        {"items": [{"id": "srv_2"}], "next": None},
    )
    found = Client().servers.list()
    assert [each["id"] for each in found] == ["srv_1", "srv_2"]
    assert found.next is None
    assert api.requests[1].query["after"] == "c1"


def test_limited_list_says_that_there_is_more(api: Fake) -> None:
    """With a limit, only so many are asked for and the cursor of the rest is kept."""
    api.says("GET /v1/servers", {"items": [{"id": "srv_1"}], "next": "c1"})
    found = Client().servers.list(limit=1)
    assert (api.requests[0].query["limit"], found.next, len(found)) == ("1", "c1", 1)


def test_only_given_fields_are_sent(api: Fake) -> None:
    """Fields left out are left to the API, which refuses what it does not know."""
    api.says("POST /v1/images/golden/clones", operation(kind="clone.create"), 202)
    Client().clones.create("golden", source_kind="image", name="qa-{n}", count=2)
    assert api.requests[0].body == {"name": "qa-{n}", "count": 2, "with_memory": False}


def test_names_stay_inside_their_path_segment(api: Fake) -> None:
    """A name with a slash or made of dots cannot reach another resource."""
    with pytest.raises(Problem):
        Client().servers.get("../hosts")
    with pytest.raises(Problem):
        Client().servers.get("..")
    assert [each.path for each in api.requests] == ["/v1/servers/..%2Fhosts", "/v1/servers/%2E%2E"]


def test_empty_name_is_refused_before_it_is_sent(api: Fake) -> None:
    """An empty name would mean the list; it is refused here."""
    with pytest.raises(Problem) as caught:
        Client().images.delete("")
    assert caught.value.code == "name_empty"
    assert api.requests == []


def test_follow_takes_up_where_the_last_connection_ended(api: Fake) -> None:
    """A stream that breaks goes on after the last event seen, by Last-Event-ID."""
    api.streams = [
        ': hello\n\nid: 1\nevent: x\ndata: {"type":\ndata: "a"}\n\n',
        'id: 2\ndata: {"type": "b"}\n\n',
    ]
    stream = Client().follow()
    assert [next(stream), next(stream)] == [{"type": "a"}, {"type": "b"}]
    seen = [each.headers.get("last-event-id") for each in api.calls("GET /v1/events/stream")]
    assert seen == [None, "1"]


def test_follow_that_was_told_nothing_goes_on_after_the_id_it_began_with(api: Fake) -> None:
    """What happens while the connection is renewed is not lost; a comment gives no id."""
    api.streams = [": hello\n\n", "id: 1\n\n", ": ping\n\n", 'id: 2\ndata: {"type": "b"}\n\n']
    assert next(Client().follow()) == {"type": "b"}
    seen = [each.headers.get("last-event-id") for each in api.calls("GET /v1/events/stream")]
    assert seen == [None, None, "1", "1"]


def test_token_is_read_from_the_file_named(
    api: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRIPTYCH_TOKEN_FILE is read where TRIPTYCH_TOKEN is not set."""
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.delenv("TRIPTYCH_TOKEN")
    monkeypatch.setenv("TRIPTYCH_TOKEN_FILE", str(tmp_path / "token"))
    api.says("GET /v1/hosts", {"items": [], "next": None})
    Client().hosts.list()
    assert api.requests[0].headers["authorization"] == "Bearer from-file"


def test_stored_token_goes_to_the_stored_url_only(
    api: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naming another API does not hand it the token of the one logged in to."""
    monkeypatch.delenv("TRIPTYCH_TOKEN")
    api.says("GET /v1/hosts", {"items": [], "next": None})
    save_login(Access("https://triptych.example.org", "stored"))
    Client().hosts.list()
    assert "authorization" not in api.requests[0].headers
    save_login(Access(api.url, "stored"))
    Client().hosts.list()
    assert api.requests[1].headers["authorization"] == "Bearer stored"


def test_login_file_is_the_owner_s_alone() -> None:
    """The stored token is readable by its owner only."""
    path = save_login(Access("http://127.0.0.1:8080", "stored"))
    assert config_path() == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {"url": "http://127.0.0.1:8080", "token": "stored"}


def test_no_address_is_told_before_anything_is_sent() -> None:
    """Without a URL anywhere, the error says how to give one."""
    with pytest.raises(NotConfigured) as caught:
        Client()
    assert "triptych login" in caught.value.detail


def test_token_does_not_show_in_the_repr() -> None:
    """A token never reaches a log by way of a repr."""
    assert "hush" not in repr(Access("http://127.0.0.1", "hush"))


def test_everything_promised_is_exported() -> None:
    """`from triptych import …` gives what `__all__` names."""
    assert all(hasattr(triptych, name) for name in triptych.__all__)
