"""The host's own report: its row, and the mirror of its libvirt domains.

All three services of a host run a reporter; the one that holds the lock reports. The API
thus shows domains and their states without talking to libvirt.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
from dataclasses import asdict
from typing import Any

import structlog
from sqlalchemy import delete, select

from shared import errors, lookups, mounted
from shared.copying import vault, version
from shared.database import database_now, transaction
from shared.disks.reflink import can_reflink
from shared.hypervisor import inventory
from shared.hypervisor.connection import connect
from shared.models import Domain
from shared.models.hosts import SILENCE
from shared.settings import settings

log = structlog.get_logger()

AGAIN_S = 5.0
"""Until a vault that is not there is looked for again."""
PULSE_S = 20.0
"""How often the host is told to be there at least: a report may have to wait for libvirt."""


class HostReporter(threading.Thread):
    """Keeps the host's row and its domains current, within a moment of each change."""

    def __init__(self) -> None:
        super().__init__(name="host-reporter", daemon=True)
        self._stopped = threading.Event()
        self._reporting_since: float | None = None

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while (lock := self._opened()) is None:
            if self._stopped.wait(AGAIN_S):
                return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            threading.Thread(target=self._pulse, name="host-pulse", daemon=True).start()
            inventory.watch(
                settings().libvirt_uri, self._changed, self._stopped, on_lost=self._unreachable
            )
        finally:
            os.close(lock)

    def _opened(self) -> int | None:
        """The lock's file; None while the vault that it is in is not there."""
        if not self._has_vault():
            return None
        path = settings().vault / ".reporter.lock"
        try:
            try:
                return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # which is enough for a lock
        except OSError as error:
            self._tell(f"{path} cannot be opened: {error.strerror}")
        return None

    def _pulse(self) -> None:
        while not self._stopped.wait(PULSE_S):
            since = self._reporting_since
            if since and (waited := time.monotonic() - since) > SILENCE.total_seconds():
                self._tell(f"libvirt has not answered for {waited:.0f} s")
                continue
            try:
                with transaction() as session:
                    host = lookups.reporting_host(session, settings().host)
                    host.last_seen_at = database_now(session)
            except Exception as error:
                log.warning("host.report_failed", reason=str(error))

    def _has_vault(self) -> bool:
        try:
            mounted.ensure()
        except errors.VaultNotMounted as error:
            self._tell(error.detail)
        except Exception as error:
            log.warning("host.report_failed", reason=str(error))
        else:
            return True
        return False

    def _changed(self) -> None:
        self._reporting_since = time.monotonic()
        try:
            report()
        except Exception as error:
            log.warning("host.report_failed", reason=str(error))
        finally:
            self._reporting_since = None

    def _unreachable(self, reason: str) -> None:
        self._tell(f"libvirt does not answer: {reason}")

    def _tell(self, problem: str) -> None:
        """Write down what is wrong: it is not the workers that are away."""
        try:
            with transaction() as session:
                host = lookups.reporting_host(session, settings().host)
                host.last_seen_at, host.problem = database_now(session), problem
        except Exception as error:
            log.warning("host.report_failed", reason=str(error))


def report() -> None:
    """Write what this host can do and the domains it has."""
    connection = connect(settings().libvirt_uri)
    seen = {facts.uuid: facts for facts in inventory.scan(connection)}
    there = inventory.uuids(connection)
    problem, facts = None, None
    try:
        facts = _facts(connection)
    except errors.VaultNotMounted as error:
        problem = error.detail
    with transaction() as session:
        host = lookups.reporting_host(session, settings().host)
        host.last_seen_at, host.problem = database_now(session), problem
        host.facts = facts or host.facts
        known = {
            row.uuid: row
            for row in session.scalars(select(Domain).where(Domain.host == host.name))  # type: ignore[arg-type]
        }
        for gone in known.keys() - seen.keys() - there:
            session.execute(
                delete(Domain).where(Domain.host == host.name, Domain.uuid == gone)  # type: ignore[arg-type]
            )
        for uuid, domain in seen.items():
            session.merge(Domain(host=host.name, **{**asdict(domain), "uuid": uuid}))


def _facts(connection: Any) -> dict[str, Any]:
    """Raises VaultNotMounted."""
    root = vault().root
    usage = shutil.disk_usage(root)
    shares = can_reflink(root, root)
    return {
        "libvirt": version(connection.getLibVersion()),
        "qemu": version(connection.getVersion()),
        "vault": str(root),
        "reflink": shares,
        "quiesce": True,
        "memory": shares,
        "free_bytes": usage.free,
        "total_bytes": usage.total,
    }
