"""All settings, read from the environment (`TRIPTYCH_…`); each secret also as `…_FILE`."""

from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _seconds(value: Any) -> Any:
    """A plain number in the environment is seconds."""
    if isinstance(value, str) and value.replace(".", "", 1).isdigit():
        return float(value)
    return value


Duration = Annotated[timedelta, BeforeValidator(_seconds)]
"""Seconds, `HH:MM:SS`, or ISO 8601 such as `P2D` and `PT90M`."""

_SECRETS = ("token", "database_url", "broker_url")


class Settings(BaseSettings):
    """One instance per process, by `settings()`."""

    model_config = SettingsConfigDict(env_prefix="TRIPTYCH_", extra="ignore")

    token: SecretStr | None = Field(None, description="the API's bootstrap token")
    token_file: Path | None = None
    database_url: SecretStr = Field(
        SecretStr("sqlite:///.triptych/triptych.db"), description="SQLAlchemy URL"
    )
    database_url_file: Path | None = None
    broker_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"))
    broker_url_file: Path | None = None
    queue_prefix: str = Field("triptych:", description="prefix of every broker key")

    host: str = Field("local", pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    libvirt_uri: str = "qemu:///system"
    vault: Path = Path("/var/lib/triptych")
    clone_dir: Path | None = Field(None, description="where clones' disks go; else the source's")
    mac_prefix: str = Field("52:54:00", pattern=r"^([0-9a-f]{2}:){2}[0-9a-f]{2}$")
    concurrency: int = Field(2, ge=1, le=32, description="copies at once, per service and host")

    snapshot_retention: Duration = Field(timedelta(hours=48), gt=timedelta(0))
    snapshot_warning: Duration = Field(timedelta(hours=6), ge=timedelta(0))
    undo_retention: Duration = Field(timedelta(hours=24), ge=timedelta(0))
    tick: float = Field(30, gt=0, le=60, description="seconds between beat's ticks")
    lease: float = Field(20, ge=2, description="seconds a worker may be silent before it is lost")
    max_attempts: int = Field(3, ge=1)
    free_floor: float = Field(0.05, ge=0, lt=1, description="share of a file system kept free")

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in _SECRETS:
            path = values.get(f"{name}_file")
            if path and not values.get(name):
                values[name] = Path(path).read_text().strip()
        return values


@cache
def settings() -> Settings:
    return Settings()
