"""Opaque identifiers that sort by the time they were made."""

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32
_RANDOM_BITS = 60

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """Return e.g. `snp_01k9…`: 48 bits of milliseconds, 60 random bits (ULID's shape).

    Those of one process sort as they were made, within a millisecond and across a clock that
    steps back: one that would not is the last one's successor instead.
    """
    global _last
    drawn = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    with _lock:
        number = _last = max(drawn, _last + 1)
    digits = []
    for _ in range(22):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return f"{prefix}_{''.join(reversed(digits))}"
