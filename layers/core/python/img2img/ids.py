"""Time-ordered ids: ULIDs (https://github.com/ulid/spec), so that a job's key sorts by creation time."""

from __future__ import annotations

import re
import secrets

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS = 80
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


def _encode(number: int) -> str:
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def new_id(now_ms: int) -> str:
    """Return a new ULID. Its random half is the operating system's, which SnapStart does not copy."""
    return _encode(now_ms << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS))


def first_id_at(ms: int) -> str:
    """Return the smallest ULID of a millisecond, clamped to what a ULID can hold."""
    return _encode(min(max(ms, 0), 2**48 - 1) << _RANDOM_BITS)


def _decode(ulid: str) -> int:
    number = 0
    for character in ulid:
        number = number << 5 | _ALPHABET.index(character)
    return number


def ms_of(ulid: str) -> int:
    """Return the epoch millisecond that a ULID was made in."""
    return _decode(ulid) >> _RANDOM_BITS


def id_before(ulid: str) -> str:
    """Return the ULID just below `ulid`."""
    return _encode(max(_decode(ulid) - 1, 0))
