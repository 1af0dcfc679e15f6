"""`triptych-admin`: what is done on a host itself, past the API; `python -m shared.admin`.

It talks to the database, the vault and the libvirt of this host, with the settings of its
workers.
"""

import argparse
import json
import sys
from dataclasses import asdict

from shared import doctor, logs, mounted
from shared.database import transaction
from shared.errors import VaultNotMounted
from shared.rescan import rescan, survey
from shared.settings import settings
from shared.vault import Vault

BAD = ("incomplete", "conflict", "registered_anew", "foreign", "unreadable", "missing", "deleted")
"""Verdicts that somebody has to look at."""


class _DryRun(Exception):
    """Nothing is to be kept."""


def main() -> int:
    """0: nothing differs, or not any more; 1: something is left to look at."""
    asked = _parser().parse_args()
    status: int = asked.run(asked)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triptych-admin", description=__doc__)
    nouns = parser.add_subparsers(dest="noun", required=True)
    verbs = nouns.add_parser("vault", help="this host's vault").add_subparsers(required=True)
    scan = verbs.add_parser(
        "rescan",
        help="add rows for the copies in the vault that the database does not know",
        description=rescan.__doc__,
    )
    scan.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    scan.set_defaults(run=_rescan)
    replaced = verbs.add_parser(
        "adopt",
        help="take what is at TRIPTYCH_VAULT for the host's vault from now on",
        description=mounted.adopt.__doc__,
    )
    replaced.set_defaults(run=_adopt)
    look = nouns.add_parser(
        "doctor",
        help="compare database, libvirt and disks of this host",
        description=doctor.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    look.add_argument("--fix", action="store_true", help="repair what can be; else change nothing")
    look.set_defaults(run=_doctor)
    for each in (scan, look):
        each.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _adopt(_: argparse.Namespace) -> int:
    _refuse_no_directory()
    print(f"{settings().vault} ({mounted.adopt()}) is the vault of host {settings().host} now")
    print("`vault rescan` tells which copies are in it")
    return 0


def _refuse_no_directory() -> None:
    if not settings().vault.is_dir():
        _parser().error(
            f"{settings().vault} is no directory; TRIPTYCH_VAULT names this host's vault"
        )


def _rescan(asked: argparse.Namespace) -> int:
    _refuse_no_directory()
    try:
        mounted.look()
    except VaultNotMounted as error:
        print(error.detail, file=sys.stderr)
        return 1
    found, vault = [], Vault(settings().vault)
    seen = survey(vault)
    try:
        with transaction() as session:
            found = rescan(session, vault, seen)
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


def _doctor(asked: argparse.Namespace) -> int:
    found = doctor.examine()
    if asked.fix:
        doctor.repair(found)
    left = [each for each in found if not each.fixed]
    if asked.json:
        print(json.dumps([each.told() for each in found], indent=2))
        return int(bool(left))
    for each in found:
        print(each.line())
    repairable = sum(each.repair is not None for each in left)
    counted = f"{len(found)} difference{'s' * (len(found) != 1)}"
    if not found:
        print("nothing differs")
    elif asked.fix:
        print(f"{counted}, {len(found) - len(left)} fixed, {len(left)} left")
    else:
        print(f"{counted}, {repairable} of which --fix repairs")
    return int(bool(left))


if __name__ == "__main__":
    logs.configure()  # to stderr
    sys.exit(main())
