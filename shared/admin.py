"""`triptych-admin`: what is done on a host itself, past the API; `python -m shared.admin`.

It talks to the database and the vault of this host, with the settings of its workers.
"""

import argparse
import json
import sys
from dataclasses import asdict

from shared.copying import vault
from shared.database import transaction
from shared.rescan import rescan
from shared.settings import settings

BAD = ("conflict", "unreadable", "missing", "deleted")
"""Verdicts that somebody has to look at."""


class _DryRun(Exception):
    """Nothing is to be kept."""


def main() -> int:
    """0: database and vault agree now; 1: something is left to look at."""
    parser = argparse.ArgumentParser(prog="triptych-admin", description=__doc__)
    nouns = parser.add_subparsers(dest="noun", required=True)
    verbs = nouns.add_parser("vault", help="this host's vault").add_subparsers(required=True)
    scan = verbs.add_parser(
        "rescan",
        help="add rows for the copies in the vault that the database does not know",
        description=rescan.__doc__,
    )
    scan.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    scan.add_argument("--json", action="store_true", help="print the findings as JSON")
    asked = parser.parse_args()
    if not vault().root.is_dir():
        parser.error(f"{settings().vault} is no directory; TRIPTYCH_VAULT names this host's vault")
    found = []
    try:
        with transaction() as session:
            found = rescan(session, vault())
            if asked.dry_run:
                raise _DryRun
    except _DryRun:
        pass
    if asked.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        for each in found:
            print(f"{each.verdict:12} {each.path}" + (f": {each.detail}" if each.detail else ""))
        adopted = sum(each.verdict == "adopted" for each in found)
        print(f"{len(found)} copies, {adopted} {'would be ' * asked.dry_run}adopted")
    return int(any(each.verdict in BAD for each in found))


if __name__ == "__main__":
    sys.exit(main())
