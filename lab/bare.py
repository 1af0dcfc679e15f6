"""A command on a bare Debian: scripts/bare-debian bookworm|trixie COMMAND [ARGUMENT...]

The machine it runs on is an ordinary unprivileged container with nothing in it but Debian's
base system, make, python3 and CA certificates; the command runs there as root in a fresh clone
of this repository (what is committed, and only that), and the container is removed afterwards.
Packages come as they do on this machine: proxies, index and CA are handed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.containers import CA_BUNDLE, HOME, Engine, EngineUnavailable, engine, registry_access, run

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = """\
FROM debian:{suite}-slim
RUN apt-get update && apt-get install -y --no-install-recommends make python3 ca-certificates
"""
# The shell stays as process 1, and reaps what daemons leave to it: libvirt takes a QEMU that
# nobody waits for as one that will not die.
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] not in ("bookworm", "trixie"):
        print((__doc__ or "").splitlines()[0], file=sys.stderr)
        return 2
    suite, *command = sys.argv[1:]
    try:
        with engine() as found:
            return _run(found, suite, command)
    except EngineUnavailable as reason:
        print(f"bare-debian: {reason}", file=sys.stderr)
        return 1


def _run(found: Engine, suite: str, command: list[str]) -> int:
    image = f"triptych-bare:{suite}"
    found.ensure(f"debian:{suite}-slim")
    with tempfile.TemporaryDirectory(dir=HOME) as work:
        context = Path(work)
        (context / "Dockerfile").write_text(DOCKERFILE.format(suite=suite))
        found.docker("build", "--quiet", "--network", "host", "--tag", image, work)
        run(["git", "clone", "--quiet", "--no-hardlinks", str(REPOSITORY), f"{work}/triptych"])
        options = ["--network", "host", "--workdir", "/triptych"]
        for name, value in registry_access(context).items():
            options += ["--env", f"{name}={value}"]
        container = found.docker("create", *options, image, *SHELL, *command).strip()
        try:
            found.docker("cp", f"{work}/triptych", f"{container}:/")
            if (bundle := context / CA_BUNDLE.lstrip("/")).exists():
                found.docker("cp", str(bundle), f"{container}:{CA_BUNDLE}")
            start = ["docker", "start", "--attach", container]
            return subprocess.run(start, env=found.environment).returncode
        finally:
            found.docker("rm", "--force", "--volumes", container)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
