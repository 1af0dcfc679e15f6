"""Settings: secrets from files and in URLs, and what is refused, in words and without secrets."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sqlalchemy import make_url

from shared.settings import Settings, settings

AWKWARD = "s/e@c:r#e?t %41+"


@pytest.fixture(autouse=True)
def _no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.cache_clear()
    for name in Settings.model_fields:
        monkeypatch.delenv(f"TRIPTYCH_{name.upper()}", raising=False)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings of an environment in which these variables are set."""

    def read(**values: Any) -> Settings:
        for name, value in values.items():
            monkeypatch.setenv(f"TRIPTYCH_{name.upper()}", str(value))
        settings.cache_clear()
        return settings()

    return read


def refusal(given: Any, **values: Any) -> str:
    with pytest.raises(SystemExit) as refused:
        given(**values)
    return str(refused.value)


@pytest.mark.parametrize(
    "name", ["token", "database_url", "database_password", "broker_url", "broker_password"]
)
def test_a_secret_comes_from_a_file(given: Any, tmp_path: Path, name: str) -> None:
    """Each secret may lie in a file; white space around it is no part of it."""
    url = {"database_url": "sqlite:////x.db", "broker_url": "redis://redis/3"}
    file = tmp_path / "secret"
    file.write_text(f" {url.get(name, 'hush')}\n")

    found = getattr(given(**{f"{name}_file": file}), name)

    assert url.get(name, "hush") == found.get_secret_value()


def test_the_variable_wins_over_the_file(given: Any, tmp_path: Path) -> None:
    """Where both are set the file is not even read."""
    found = given(token="of the variable", token_file=tmp_path / "missing").token
    assert found.get_secret_value() == "of the variable"


def test_an_unreadable_file_is_named(given: Any, tmp_path: Path) -> None:
    """The sentence names the variable and the file."""
    missing = tmp_path / "missing"
    said = refusal(given, broker_password_file=missing)
    assert "TRIPTYCH_BROKER_PASSWORD_FILE: " in said
    assert str(missing) in said


def test_a_password_is_put_into_the_database_url(given: Any) -> None:
    """Whatever characters it has, the driver reads the same password, user, host and name."""
    found = given(
        database_url="postgresql+psycopg://triptych@db.example:5432/triptych?sslmode=verify-full",
        database_password=AWKWARD,
    )
    url = make_url(found.database_url.get_secret_value())
    assert (url.username, url.password) == ("triptych", AWKWARD)
    assert (url.host, url.port, url.database) == ("db.example", 5432, "triptych")
    assert url.query == {"sslmode": "verify-full"}


@pytest.mark.parametrize(
    "url", ["redis://redis:6379/1", "redis://:old@redis:6379/1", "rediss://redis:6379/1"]
)
def test_a_password_is_put_into_the_broker_url(given: Any, url: str) -> None:
    """Also where Redis has no user names, and over a password that stands there."""
    found = urlsplit(given(broker_url=url, broker_password=AWKWARD).broker_url.get_secret_value())
    assert unquote(found.password or "") == AWKWARD
    assert (
        found.username,
        found.hostname,
        found.port,
        found.path,
    ) == ("", "redis", 6379, "/1")


def test_a_broker_over_tls_is_verified(given: Any) -> None:
    """Celery would else take any certificate, and give the password to whoever answers."""
    url = given(broker_url="rediss://redis:6379/0", broker_password="x").broker_url
    assert url.get_secret_value() == "rediss://:x@redis:6379/0?ssl_cert_reqs=required"
    url = given(broker_url="rediss://redis/0?ssl_ca_certs=/ca.crt").broker_url
    assert "?ssl_ca_certs=/ca.crt&ssl_cert_reqs=required" in url.get_secret_value()
    url = given(broker_url="rediss://redis/0?ssl_cert_reqs=none").broker_url
    assert "?ssl_cert_reqs=none" in url.get_secret_value()


def test_a_user_with_odd_characters_stays(given: Any) -> None:
    """A user that is quoted in the URL is quoted once, not twice."""
    found = given(database_url="postgresql+psycopg://a%40b@db/t", database_password="x")
    assert make_url(found.database_url.get_secret_value()).username == "a@b"


@pytest.mark.parametrize("url", ["amqp://me:hush@rabbit/", "sqs://k:hush@", "memory://hush", ""])
def test_other_brokers_are_refused(given: Any, url: str) -> None:
    """The sentence says which are taken and where the reason stands, and not the password."""
    said = refusal(given, broker_url=url)
    assert "TRIPTYCH_BROKER_URL: the broker must be Redis" in said
    assert "docs/decisions/0012-redis-only.md" in said
    assert "hush" not in said


def test_a_broker_url_from_a_file_is_looked_at_too(given: Any, tmp_path: Path) -> None:
    """Another broker does not come in by the file."""
    file = tmp_path / "url"
    file.write_text("amqp://me:hush@rabbit/")
    said = refusal(given, broker_url_file=file)
    assert "must be Redis" in said
    assert "hush" not in said


@pytest.mark.parametrize(
    "uri",
    [
        "qemu:///system",
        "qemu:///embed?root=/tmp/x",
        "qemu+unix:///system?socket=/run/other/libvirt-sock",
        "qemu+tcp://localhost/system",
        "qemu+tls://127.0.0.1:16514/system",
        "qemu+tcp://[::1]/system",
        "test:///default",
    ],
)
def test_a_libvirt_of_this_machine_is_taken(given: Any, uri: str) -> None:
    """Whatever the transport, it ends on this machine."""
    assert uri == given(libvirt_uri=uri).libvirt_uri


@pytest.mark.parametrize(
    "uri",
    [
        "qemu+ssh://root@other/system",
        "qemu+ssh://other/system?socket=/run/libvirt/libvirt-sock",
        "qemu+tls://other.example/system",
        "qemu+tcp://10.0.0.7:16509/system",
        "qemu+libssh2://other/system",
        "qemu://other/system",
        "qemu+ext:///system?command=/usr/local/bin/tunnel",
        "other",
    ],
)
def test_a_libvirt_of_another_machine_is_refused(given: Any, uri: str) -> None:
    """Before anything is copied: its paths would be taken for this machine's."""
    said = refusal(given, libvirt_uri=uri)
    assert "TRIPTYCH_LIBVIRT_URI: " in said
    assert "Run the three workers on the other machine" in said


def test_all_that_is_wrong_is_said_at_once(given: Any) -> None:
    """One start is enough to learn of every wrong variable."""
    said = refusal(given, host="Not A Name", concurrency=0, libvirt_uri="qemu+ssh://other/system")
    for name in ("TRIPTYCH_HOST: ", "TRIPTYCH_CONCURRENCY: ", "TRIPTYCH_LIBVIRT_URI: "):
        assert name in said
