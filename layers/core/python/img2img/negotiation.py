"""What a caller asks for in headers, and what the answer's headers may be. Takes their values, never an event."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_WAIT = 25
# What of an invocation's time is left for the answer when the wait is over: the gateway hangs up at 29 s.
_ANSWER_SECONDS = 2
# Lambda answers with at most 6 MB, base64 and JSON included; the rest of the answer stays far below the difference.
MAX_ANSWER = 6_000_000 - 100_000
# The gateway turns an answer binary only if the first type of `Accept` stands in the template's BinaryMediaTypes.
BINARY_TYPES = ("image/*", "image/jpeg", "image/png", "image/webp", "image/avif")
EXPOSED_HEADERS = (
    "Location, Content-Location, Retry-After, Preference-Applied, Idempotent-Replayed, "
    "Content-Disposition, x-remaining-credits, x-generation-time, x-request-id"
)


@dataclass(frozen=True)
class Patience:
    """How many seconds a caller waits, and what `Preference-Applied` says of it."""

    seconds: int
    applied: str


def patience(prefer: str) -> Patience:
    """Return how long to wait for a job by the header `Prefer` (RFC 7240); of too long a wait, the longest."""
    preferences = [item.strip() for item in re.split("[,;]", prefer.lower())]
    for item in preferences:
        if match := re.fullmatch(r"wait\s*=\s*\"?(\d{1,9})\"?", item):
            seconds = min(int(match[1]), MAX_WAIT)
            return Patience(seconds, f"wait={seconds}")
    if "respond-async" in preferences:
        return Patience(0, "respond-async")
    return Patience(MAX_WAIT, f"wait={MAX_WAIT}")


def time_to_wait(wanted: float, remaining_ms: int) -> float:
    """Return how many seconds of a wait fit into what is left of an invocation."""
    return max(min(wanted, remaining_ms / 1000 - _ANSWER_SECONDS), 0)


def media_type(content_type: str) -> str:
    """Return the media type of a `Content-Type`, without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def first_accepted(accept: str) -> str:
    """Return the first media type of `Accept`, the one that the gateway looks at."""
    return re.split("[,;]", accept.lower())[0].strip()


def wants_bytes(accept: str) -> bool:
    """Whether the caller asks for a picture itself."""
    return first_accepted(accept) in BINARY_TYPES


def route(resource: str, parameters: Mapping[str, str]) -> str:
    """Return the path of a request to a resource, without the base path of a custom domain's mapping."""
    return re.sub(r"\{(\w+)\}", lambda name: parameters[name[1]], resource)


def base_url(*, forwarded_proto: str, host: str, prefix: str) -> str:
    """Return the API's address up to its stage, or to a custom domain's mapping, without a slash at its end."""
    # The last one is the gateway's own; a caller may have sent others.
    scheme = forwarded_proto.rpartition(",")[2].strip() or "https"
    return f"{scheme}://{host}{prefix}"
