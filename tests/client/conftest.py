"""A fake API per test, a clean environment, and the command line run in-process."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_api import Fake, start
from triptych import client, transport
from triptych.cli import main


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.startswith("TRIPTYCH_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(transport, "BACKOFF", (0.01, 0.01, 0.01))
    monkeypatch.setattr(client, "RECONNECT", 0.01)
    with monkeypatch.context() as zone:
        zone.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake, server = start()
    monkeypatch.setenv("TRIPTYCH_URL", fake.url)
    monkeypatch.setenv("TRIPTYCH_TOKEN", "secret")
    yield fake
    server.shutdown()
    server.server_close()


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Triptych = Callable[..., Run]


@pytest.fixture
def triptych(capsys: pytest.CaptureFixture[str]) -> Triptych:
    def run(*words: str) -> Run:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        captured = capsys.readouterr()
        code = end.value.code
        return Run(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
