"""The host's own report: its row, and the mirror of its libvirt domains.

All three services of a host run a reporter; the one that holds the lock reports. The API
thus shows domains and their states without talking to libvirt.
"""

import fcntl
import os
import shutil
import threading
from dataclasses import asdict
from typing import Any

import structlog
from sqlalchemy import delete, select
from sqlmodel import Session

from shared.copying import vault, version
from shared.database import database_now, transaction
from shared.disks.reflink import can_reflink
from shared.hypervisor import inventory
from shared.hypervisor.connection import connect
from shared.models import Domain, Host
from shared.settings import settings

log = structlog.get_logger()


class HostReporter(threading.Thread):
    """Keeps the host's row and its domains current, within a moment of each change."""

    def __init__(self) -> None:
        super().__init__(name="host-reporter", daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        vault().create()
        lock = os.open(
            vault().root / ".reporter.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(lock, fcntl.LOCK_EX)
        inventory.watch(
            settings().libvirt_uri, self._changed, self._stopped, on_lost=self._unreachable
        )

    def _changed(self) -> None:
        try:
            report()
        except Exception as error:
            log.warning("host.report_failed", reason=str(error))

    def _unreachable(self, reason: str) -> None:
        try:
            with transaction() as session:
                host = _host_row(session)
                host.last_seen_at = database_now(
                    session
                )  # it is libvirt that is away, not the workers
                host.problem = f"libvirt does not answer: {reason}"
        except Exception as error:
            log.warning("host.report_failed", reason=str(error))


def report() -> None:
    """Write what this host can do and the domains it has."""
    connection = connect(settings().libvirt_uri)
    seen = {facts.uuid: facts for facts in inventory.scan(connection)}
    facts = _facts(connection)
    with transaction() as session:
        host = _host_row(session)
        host.last_seen_at, host.problem, host.facts = database_now(session), None, facts
        known = {
            row.uuid: row
            for row in session.scalars(select(Domain).where(Domain.host == host.name))  # type: ignore[arg-type]
        }
        for gone in known.keys() - seen.keys():
            session.execute(
                delete(Domain).where(Domain.host == host.name, Domain.uuid == gone)  # type: ignore[arg-type]
            )
        for uuid, domain in seen.items():
            session.merge(Domain(host=host.name, **{**asdict(domain), "uuid": uuid}))


def _host_row(session: Session) -> Host:
    host = session.get(Host, settings().host)
    if host is None:
        host = Host(name=settings().host)
        session.add(host)
        session.flush()
    return host


def _facts(connection: Any) -> dict[str, Any]:
    root = settings().vault
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
