"""Opaque identifiers that sort by the time they were made."""

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32


def new_id(prefix: str) -> str:
    """Return e.g. `snp_01k9…`: 48 bits of milliseconds, 60 random bits (ULID's shape)."""
    number = (time.time_ns() // 1_000_000) << 60 | secrets.randbits(60)
    digits = []
    for _ in range(22):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return f"{prefix}_{''.join(reversed(digits))}"
