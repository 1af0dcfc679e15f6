"""Many rows in one transaction, of which one may be broken."""

from collections.abc import Callable

from shared.operations.patience import DATABASE_AWAY

PAGE = 500
"""Rows that are dealt with in one transaction; what a tick holds in memory."""


def all_but_broken(
    ids: list[str], work: Callable[[list[str]], int], broken: Callable[[str], None]
) -> int:
    """What `work` comes to for all of these together, or, if one keeps the others from it, in ever
    smaller groups. `broken` is called for that one, while its error is handled.

    Raises what a database raises that is away.
    """
    try:
        return work(ids)
    except DATABASE_AWAY:
        raise
    except Exception:
        if len(ids) == 1:
            broken(ids[0])
            return 0
        half = len(ids) // 2
        parts = ids[:half], ids[half:]
    return sum(all_but_broken(part, work, broken) for part in parts)
