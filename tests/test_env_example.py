"""`.env.example` is what a person reads to learn what a deployment can be told."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_it_names_what_the_compose_files_read() -> None:
    """Every variable of the two files, and no other."""
    read: set[str] = set()
    for file in ("docker-compose.yml", "docker-compose.host.yml"):
        text = (ROOT / file).read_text()
        read |= set(re.findall(r"\$\{(TRIPTYCH_[A-Z_]+)", text))
        read |= set(re.findall(r"^ +(TRIPTYCH_[A-Z_]+):$", text, re.MULTILINE))

    named = re.findall(r"^#?(TRIPTYCH_[A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert sorted(named) == sorted(read)
