"""Owns a Docker engine for tests and tries, and base images where no registry can be reached.

The machine's engine is used where one answers; else a private one is started (root, Debian's
docker.io), shared by all who need it at once, and stopped by the last. What it builds is kept
in its own directory. Base images are pulled; where no registry answers, stand-ins of the same
names are made of Debian's packages, so that Dockerfiles and compose files stay as they are.

Needs nothing but the standard library: `scripts/bare-debian` uses it on a bare machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOME = Path(os.environ.get("TRIPTYCH_LAB_DOCKER", "/var/tmp/triptych-lab"))  # noqa: S108
IMAGES = Path(__file__).parent / "images"
DEBIAN = {"debian:trixie-slim": "trixie", "debian:bookworm-slim": "bookworm"}
STAND_INS = {"postgres:17": "postgres", "redis:8": "redis", "prom/prometheus:v3.5.0": "prometheus"}
START_TIMEOUT_S = 60
PULL_TIMEOUT_S = 600
#: Where pip inside a build finds a company's CA. Not where Debian's package writes its own anew.
CA_BUNDLE = "/usr/local/share/ca-bundle.pem"
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class EngineUnavailable(RuntimeError):
    """No Docker engine answers and none can be started; the message tells what is missing."""


class Engine:
    """A Docker engine that answers at `host`."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.environment = {
            **os.environ,
            "DOCKER_HOST": host,
            # Debian 12's engine comes without buildx.
            "DOCKER_BUILDKIT": "1" if _has_plugin("buildx") else "0",
            "COMPOSE_DOCKER_CLI_BUILD": "1" if _has_plugin("buildx") else "0",
        }

    def docker(self, *arguments: str, timeout: float | None = None) -> str:
        """What `docker …` prints; raises CalledProcessError with its complaint as a note."""
        return run(["docker", *arguments], self.environment, timeout=timeout)

    def has(self, image: str) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.docker("image", "inspect", image)
            return True
        return False

    def ensure(self, *images: str) -> None:
        """Have the images: known already, pulled, or made of Debian's packages."""
        for image in images:
            with locked(image.replace("/", "-")):
                if not self.has(image) and not self._pull(image):
                    self._make(image)

    def compose(self) -> list[str]:
        """The command that is Compose v2: the engine's plugin, or Debian 13's package, unpacked."""
        if _has_plugin("compose"):
            return ["docker", "compose"]
        binary = HOME / "bin" / "docker-compose"
        with locked("compose"):
            if not binary.exists():
                _fetch_compose(binary)
        return [str(binary)]

    def size(self, image: str) -> int:
        """Bytes of all the image's layers."""
        return int(json.loads(self.docker("image", "inspect", image))[0]["Size"])

    def _pull(self, image: str) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            self.docker("pull", "--quiet", image, timeout=PULL_TIMEOUT_S)
            return True
        return False

    def _make(self, image: str) -> None:
        if suite := DEBIAN.get(image):
            self._import_debian(image, suite)
        elif folder := STAND_INS.get(image):
            self.ensure("debian:trixie-slim")
            self.docker("build", "--tag", image, str(IMAGES / folder))
        else:
            raise EngineUnavailable(f"{image} can be neither pulled nor made of Debian packages")

    def _import_debian(self, image: str, suite: str) -> None:
        """Debian's base system, told how this machine reaches package registries."""
        with tempfile.TemporaryDirectory(dir=HOME) as work:
            tree = Path(work) / "tree"
            mirror = os.environ.get("TRIPTYCH_LAB_MIRROR", "")
            run(["debootstrap", "--variant=minbase", suite, str(tree), *filter(None, [mirror])])
            _slim(tree)
            changes = []
            for name, value in registry_access(tree).items():
                changes += ["--change", f"ENV {name}={json.dumps(value)}"]
            archive = Path(work) / "base.tar"
            run(["tar", "-C", str(tree), "-cf", str(archive), "."])
            shutil.rmtree(tree)
            self.docker("import", *changes, "--change", 'CMD ["bash"]', str(archive), image)


def _slim(tree: Path) -> None:
    """Keep no package files and documentation, now and later, as the official slim image does."""
    for cached in ("var/lib/apt/lists", "var/cache/apt/archives"):
        shutil.rmtree(tree / cached, ignore_errors=True)
        (tree / cached / "partial").mkdir(parents=True)
    for unread in ("doc", "man", "locale", "info"):
        shutil.rmtree(tree / "usr/share" / unread, ignore_errors=True)
    options = [f"path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale")]
    options.append("force-unsafe-io")  # what a crash spoils of a layer in the making is made anew
    (tree / "etc/dpkg/dpkg.cfg.d/slim").write_text("\n".join([*options, ""]))
    (tree / "etc/apt/apt.conf.d/slim").write_text(
        'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
        'APT::Keep-Downloaded-Packages "false";\n'
        'DPkg::Post-Invoke {"rm -f /var/cache/apt/archives/*.deb || true";};\n'
    )


def registry_access(tree: Path) -> dict[str, str]:
    """The variables by which this machine's packages come; its CA bundle goes into `tree`."""
    names = (*PROXIES, "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if bundle:
        target = tree / CA_BUNDLE.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle, target)
        found |= {"PIP_CERT": CA_BUNDLE, "SSL_CERT_FILE": CA_BUNDLE}
    return found


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """A Docker engine: the machine's, or a private one while the block lasts.

    Raises EngineUnavailable.
    """
    if not shutil.which("docker"):
        raise EngineUnavailable("there is no `docker` command: apt-get install docker.io")
    given = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    own = f"unix://{HOME}/docker.sock"
    # Whoever was told of the private one must be counted too, or it is stopped under them.
    if given != own and _answers(given):
        HOME.mkdir(parents=True, exist_ok=True)
        yield Engine(given)
        return
    _refuse_unable()
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "users").open("w") as users:
        with locked("start"):
            if not _answers(own):
                _start_dockerd(own)
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield Engine(own)
        finally:
            with locked("start"):
                fcntl.flock(users, fcntl.LOCK_UN)
                with contextlib.suppress(BlockingIOError):  # somebody else still uses it
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _stop_dockerd()


def _refuse_unable() -> None:
    if os.geteuid() != 0:
        raise EngineUnavailable("no Docker engine answers, and only root can start one")
    for command in ("dockerd", "debootstrap"):
        if not _which(command):
            raise EngineUnavailable(f"{command} is missing: apt-get install docker.io debootstrap")


def _start_dockerd(host: str) -> None:
    # It serves whoever comes: not at the low priority of who happens to start it.
    command = ["sh", "-c", 'renice -n 0 -p $$ >/dev/null; exec "$@"', "sh"]
    command += [_which("dockerd"), "--host", host, "--pidfile", str(HOME / "docker.pid")]
    command += ["--data-root", str(HOME / "docker"), "--exec-root", str(HOME / "exec")]
    log = HOME / "dockerd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(host):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            tail = log.read_text(errors="replace")[-2000:]
            raise EngineUnavailable(f"dockerd did not come up:\n{tail}")
        time.sleep(0.1)


def _stop_dockerd() -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int((HOME / "docker.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.1)
    for mount in ("exec/netns/default", "docker"):
        subprocess.run(["umount", str(HOME / mount)], capture_output=True)


def _fetch_compose(binary: Path) -> None:
    """Debian 12's own package is the long-dead version 1."""
    with tempfile.TemporaryDirectory(dir=HOME) as work:
        home = Path(work)
        home.chmod(0o755)  # apt reads as a user of its own
        mirror = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian"])
        keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
        source = f"deb [signed-by={keys}] {mirror.splitlines()[0]} trixie main\n"
        (home / "sources.list").write_text(source)
        (home / "lists").mkdir()
        apt = ["apt-get", "-qq", "-o", f"Dir::Etc::SourceList={home}/sources.list"]
        apt += ["-o", "Dir::Etc::SourceParts=-", "-o", f"Dir::State::Lists={home}/lists"]
        apt += ["-o", f"Dir::Cache::pkgcache={home}/p", "-o", f"Dir::Cache::srcpkgcache={home}/s"]
        run([*apt, "update"])
        run([*apt, "download", "docker-compose"], cwd=home)
        run(["dpkg-deb", "-x", str(next(home.glob("*.deb"))), str(home / "tree")])
        found = home / "tree/usr/libexec/docker/cli-plugins/docker-compose"
        binary.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found, binary)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Alone on this machine in what the name stands for, while the block lasts."""
    with (HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _answers(host: str) -> bool:
    return not subprocess.run(
        ["docker", "--host", host, "version"], capture_output=True, timeout=60
    ).returncode


def _has_plugin(name: str) -> bool:
    return not subprocess.run(["docker", name, "version"], capture_output=True).returncode


def _which(command: str) -> str:
    return shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or ""


def run(
    command: list[str],
    environment: dict[str, str] | None = None,
    *,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> str:
    """What a command prints; raises CalledProcessError whose note is what it complained of."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        cwd=cwd,
        timeout=timeout,
    )
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        error.add_note((done.stdout[-3000:] + done.stderr[-3000:]).strip())
        raise error
    return done.stdout
