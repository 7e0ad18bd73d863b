"""Which jobs a caller wants listed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from img2img.ids import ULID
from img2img.jobs import Status
from img2img.params import WrongValue, checked_fields

MAX_LIMIT = 100


@dataclass(frozen=True)
class JobFilter:
    """Both times are exclusive bounds, in epoch milliseconds."""

    limit: int = 20
    cursor: str | None = None
    status: Status | None = None
    created_after: int | None = None
    created_before: int | None = None


def parse_limit(text: str) -> int:
    """Return how many items of a list are wanted. Raises `WrongValue`."""
    if re.fullmatch("[0-9]{1,3}", text) and 1 <= int(text) <= MAX_LIMIT:
        return int(text)
    raise WrongValue(f"must be an integer from 1 to {MAX_LIMIT}")


def _cursor(text: str) -> str:
    if ULID.fullmatch(text):
        return text
    raise WrongValue("must be the cursor of an earlier answer")


def _status(text: str) -> Status:
    if text in list(Status):
        return Status(text)
    raise WrongValue(f"must be one of {', '.join(Status)}")


def _time(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:
            return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        pass
    raise WrongValue("must be an ISO 8601 time with its offset, for example 2026-11-22T12:00:00Z")


_PARSERS = {
    "limit": parse_limit,
    "cursor": _cursor,
    "status": _status,
    "created_after": _time,
    "created_before": _time,
}


def parse_filter(query: Mapping[str, str]) -> JobFilter:
    """Check query parameters. Raises `InvalidRequest` naming every wrong and unknown one."""
    return JobFilter(**checked_fields(query, _PARSERS))
