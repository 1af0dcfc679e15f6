"""All settings, read from the environment (`TRIPTYCH_…`); each secret also as `…_FILE`."""

from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict


def _seconds(value: Any) -> Any:
    """A plain number in the environment is seconds."""
    if isinstance(value, str) and value.replace(".", "", 1).isdigit():
        return float(value)
    return value


Duration = Annotated[timedelta, BeforeValidator(_seconds)]
"""Seconds, `HH:MM:SS`, or ISO 8601 such as `P2D` and `PT90M`."""

_SECRETS = ("token", "database_url", "database_password", "broker_url", "broker_password")
_BROKERS = ("redis", "rediss")
_THIS_MACHINE = (None, "localhost", "127.0.0.1", "::1")


class Settings(BaseSettings):
    """One instance per process, by `settings()`."""

    model_config = SettingsConfigDict(
        env_prefix="TRIPTYCH_", extra="ignore", hide_input_in_errors=True
    )

    token: SecretStr | None = Field(None, description="the API's bootstrap token")
    token_file: Path | None = None
    database_url: SecretStr = Field(
        SecretStr("sqlite:///.triptych/triptych.db"), description="SQLAlchemy URL"
    )
    database_url_file: Path | None = None
    database_password: SecretStr | None = Field(None, description="put into the URL")
    database_password_file: Path | None = None
    broker_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"))
    broker_url_file: Path | None = None
    broker_password: SecretStr | None = Field(None, description="put into the URL")
    broker_password_file: Path | None = None
    queue_prefix: str = Field("triptych:", description="prefix of every broker key")

    host: str = Field("local", pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    libvirt_uri: str = "qemu:///system"
    vault: Path = Path("/var/lib/triptych")
    swtpm: Path = Field(
        Path("/var/lib/libvirt/swtpm"), description="where libvirt keeps the state of virtual TPMs"
    )
    clone_dir: Path | None = Field(None, description="where clones' disks go; else the source's")
    mac_prefix: str = Field("52:54:00", pattern=r"^([0-9a-f]{2}:){2}[0-9a-f]{2}$")
    identity_timeout: Duration = Field(
        timedelta(minutes=3),
        gt=timedelta(0),
        le=timedelta(minutes=30),
        description="longest a new clone's guest agent is waited for",
    )
    concurrency: int = Field(
        2,
        ge=1,
        le=32,
        description="operations at once, per service and host, and clones at once of one farm",
    )

    snapshot_retention: Duration = Field(timedelta(hours=48), gt=timedelta(0))
    snapshot_warning: Duration = Field(timedelta(hours=6), ge=timedelta(0))
    farm_warning: Duration = Field(timedelta(hours=1), ge=timedelta(0))
    undo_retention: Duration = Field(timedelta(hours=24), ge=timedelta(0))
    schedule_spread: Duration = Field(
        timedelta(minutes=15),
        ge=timedelta(0),
        le=timedelta(hours=12),
        description="within which the runs of one slot start, each server at its own time",
    )
    tick: float = Field(30, gt=0, le=60, description="seconds between beat's ticks")
    lease: float = Field(20, ge=2, description="seconds a worker may be silent before it is lost")
    max_attempts: int = Field(3, ge=1)
    liveness_file: Path | None = Field(None, description="where a worker reports its health")
    pause_budget: Duration = Field(
        timedelta(milliseconds=100), gt=timedelta(0), description="longest a copy may hold a guest"
    )
    compression: Literal["none", "zstd"] = Field(
        "none", description="of copies made by stream; those that share extents are as they are"
    )
    free_floor: float = Field(0.05, ge=0, lt=1, description="share of a file system kept free")

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in _SECRETS:
            path = values.get(f"{name}_file")
            if path and not values.get(name):
                try:
                    values[name] = Path(path).read_text().strip()
                except OSError as error:
                    raise ValueError(f"TRIPTYCH_{name.upper()}_FILE: {error}") from error
        return values

    @field_validator("broker_url")
    @classmethod
    def _refuse_other_brokers(cls, url: SecretStr) -> SecretStr:
        scheme = urlsplit(url.get_secret_value()).scheme
        if scheme not in _BROKERS:
            raise ValueError(
                f"the broker must be Redis (redis:// or rediss://), not {scheme}://: events are a "
                "Redis stream, and workers rely on a setting that Celery has for Redis alone "
                "(docs/decisions/0012-redis-only.md)"
            )
        return url if scheme == "redis" else SecretStr(_verifying(url.get_secret_value()))

    @field_validator("libvirt_uri")
    @classmethod
    def _refuse_other_machines(cls, uri: str) -> str:
        parts = urlsplit(uri)
        # `ext` runs a command that may lead anywhere; an alias of libvirt.conf has no scheme.
        elsewhere = parts.hostname not in _THIS_MACHINE or parts.scheme.endswith("+ext")
        if elsewhere or not parts.scheme:
            raise ValueError(
                "it must lead to the libvirt of this machine, such as qemu:///system: workers "
                "open the disks by the paths that libvirt tells, and would take this machine's "
                "files for the other's. Run the three workers on the other machine instead "
                "(docs/how-to/remote-libvirt.md)"
            )
        return uri

    @model_validator(mode="after")
    def _put_passwords_into_urls(self) -> "Settings":
        for url, password in (
            ("database_url", self.database_password),
            ("broker_url", self.broker_password),
        ):
            if password is not None:
                setattr(self, url, SecretStr(_with_password(getattr(self, url), password)))
        return self


def _verifying(url: str) -> str:
    """Without this parameter redis-py checks the server's certificate, and kombu does not."""
    parts = urlsplit(url)
    if "ssl_cert_reqs=" in parts.query:
        return url
    return parts._replace(
        query="&".join(filter(None, [parts.query, "ssl_cert_reqs=required"]))
    ).geturl()


def _with_password(url: SecretStr, password: SecretStr) -> str:
    parts = urlsplit(url.get_secret_value())
    address = parts.netloc.rpartition("@")[2]
    user = f"{parts.username or ''}:{quote(password.get_secret_value(), safe='')}"
    return parts._replace(netloc=f"{user}@{address}").geturl()


@cache
def settings() -> Settings:
    """This process's settings. Raises SystemExit that names the variables that are wrong."""
    try:
        return Settings()
    except ValidationError as error:
        raise SystemExit("\n".join(["Triptych does not start:", *_complaints(error)])) from error


def _complaints(error: ValidationError) -> Iterator[str]:
    for each in error.errors():
        where = "".join(f"TRIPTYCH_{str(name).upper()}: " for name in each["loc"])
        yield where + each["msg"].removeprefix("Value error, ")
