"""Is what is at TRIPTYCH_VAULT this host's vault, or the directory below a mount that is missing?

Owns: the mark, a file in the vault's root with an id of its own, and the host's row, which
remembers that id from the first start on. Whoever is about to use the vault asks here first: where
the two do not agree nothing is written, nothing removed, and no copy taken for gone.

    row   mark
    –     –      a vault that is new, or older than marks: it gets one, unless the database knows
                 copies of this host and there is none
    –     id     a database that is new, or was restored: the row gets the id
    id    same   the vault
    id    other  refused, until it is mounted or `triptych-admin vault adopt` was said
"""

import contextlib
import os
from typing import Any

import structlog
from sqlalchemy import select
from sqlmodel import Session

from shared import errors, lookups
from shared.database import reading, transaction
from shared.ids import new_id
from shared.models import Host, Image, Server, Snapshot
from shared.settings import settings

log = structlog.get_logger()

MARK = ".triptych-vault"
_NOTE = "The mark of a Triptych vault: without it no worker uses the directory. Leave it here."
_known: str | None = None
"""The id in the host's row, as this process saw it last."""


def ensure() -> None:
    """Raise VaultNotMounted unless the host's vault is there; one that is new is marked.

    That takes the reading of one small file. The row is asked where the mark is not the one that
    this process knows.
    """
    global _known
    if not seems_there():
        _known = _agreed()


def look() -> None:
    """The same by the row as it is now, and nothing is marked; for those who only look."""
    global _known
    with reading() as session:
        _known, _ = _compared(session)


def is_there() -> bool:
    try:
        ensure()
    except errors.VaultNotMounted:
        return False
    return True


def known() -> str | None:
    """The id of the host's vault, as this process saw it last."""
    return _known


def seems_there() -> bool:
    """Whether the vault of which this process knows already is there; asks no database."""
    return _known is not None and _mark() == _known


def adopt() -> str:
    """Take what is at TRIPTYCH_VAULT for the host's vault from now on; returns its id.

    Raises OSError where it is no directory that can be written to.
    """
    with transaction() as session:
        host = _locked(session)
        host.vault_id = _mark() or _marked()
        return host.vault_id


def _agreed() -> str:
    """The id in row and mark; written where one has none. Raises VaultNotMounted."""
    with reading() as session:
        agreed, _ = _compared(session)
    if agreed is not None:
        return agreed
    with transaction() as session:  # the host's three workers start at once
        host = _locked(session)
        agreed, found = _compared(session)
        if agreed is None:
            agreed = found
            if agreed is None:
                try:
                    settings().vault.mkdir(parents=True, exist_ok=True)
                    agreed = _marked()
                except OSError as error:
                    raise _refusal(f"its mark ({MARK}) cannot be written: {error}") from error
            host.vault_id = agreed
            log.info("vault.known", vault=str(settings().vault), id=agreed)
        return agreed


def _locked(session: Session) -> Host:
    host = lookups.reporting_host(session, settings().host)
    session.refresh(host, with_for_update=True)
    return host


def _compared(session: Session) -> tuple[str | None, str | None]:
    """The id in the host's row, and that of the mark; raises VaultNotMounted if they clash."""
    root = settings().vault
    host, found = session.get(Host, settings().host), _mark()
    expected = host.vault_id if host else None
    if expected is None:
        if found is None and _has_copies(session) and not any(root.glob("*/*/*")):
            raise _refusal("the database knows copies of this host, and none is there")
    elif not root.is_dir():
        raise _refusal("there is no such directory")
    elif found is None:
        raise _refusal(f"it has no mark ({MARK}), as below a mount that is missing")
    elif found != expected:
        raise _refusal(f"it has the mark of another one ({found} in {MARK} instead of {expected})")
    return expected, found


def _refusal(found: str) -> errors.VaultNotMounted:
    return errors.VaultNotMounted(
        f"{settings().vault} is not the vault of host {settings().host}: {found}. Nothing was "
        "touched. Mount the vault's file system there and ask again; if it was replaced on "
        "purpose, run `scripts/triptych-admin vault adopt` on the host, or in a deployment "
        "`docker compose exec imager python -m shared.admin vault adopt`.",
        found=found,
    )


def _has_copies(session: Session) -> bool:
    image: Any = Image
    snapshot: Any = Snapshot
    server: Any = Server
    for row, more in ((snapshot, []), (image, [image.state != "missing"])):
        query = select(row.id).join(Server, server.id == row.server_id)
        here = query.where(server.host == settings().host, row.deleted_at.is_(None), *more)
        if session.scalars(here.limit(1)).first():
            return True
    return False


def _mark() -> str | None:
    with contextlib.suppress(OSError):
        text = (settings().vault / MARK).read_text(errors="replace")
        return text.partition("\n")[0] or None
    return None


def _marked() -> str:
    """Mark the directory; returns its new id, which then outlasts a power cut."""
    root, made = settings().vault, new_id("vlt")
    fresh = root / f"{MARK}.new"
    fresh.write_text(f"{made}\n{_NOTE}\n")
    fresh.replace(root / MARK)
    for path in (root / MARK, root):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return made
