"""Which jobs a caller wants listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from img2img.dynamo import number, text
from img2img.ids import ULID, first_id_at, id_before
from img2img.jobs.job import Status
from img2img.values import WrongValue, checked_fields, parse_limit


@dataclass(frozen=True)
class JobFilter:
    """Both times are exclusive bounds, in epoch milliseconds."""

    limit: int = 20
    cursor: str | None = None
    status: Status | None = None
    created_after: int | None = None
    created_before: int | None = None

    def query(self, team: str, *, now: int) -> dict[str, Any] | None:
        """Return the query that finds a team's jobs, newest first and one more than wanted; None where there are none.

        With a status it looks at a hundred jobs at a time.
        """
        low = first_id_at(0 if self.created_after is None else self.created_after + 1)
        high = id_before(first_id_at(2**48 - 1 if self.created_before is None else self.created_before))
        if self.cursor:
            high = min(high, id_before(self.cursor))
        if low > high:
            return None
        query: dict[str, Any] = {
            "KeyConditionExpression": "pk = :pk AND sk BETWEEN :low AND :high",
            "FilterExpression": "(attribute_not_exists(expires_at) OR expires_at > :now)",
            "ExpressionAttributeValues": {
                ":pk": text(f"TEAM#{team}"),
                ":low": text(f"JOB#{low}"),
                ":high": text(f"JOB#{high}"),
                ":now": number(now),
            },
            "ScanIndexForward": False,
            "Limit": self.limit + 1 if self.status is None else 100,
        }
        if self.status is not None:
            query["FilterExpression"] += " AND #status = :status"
            query["ExpressionAttributeNames"] = {"#status": "status"}
            query["ExpressionAttributeValues"][":status"] = text(self.status)
        return query


def _cursor(text: str) -> str:
    if ULID.fullmatch(text):
        return text
    raise WrongValue("must be the cursor of an earlier answer")


def _status(text: str) -> Status:
    if text in list(Status):
        return Status(text)
    raise WrongValue(f"must be one of {', '.join(Status)}")


def _moment(text: str) -> int:
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
    "created_after": _moment,
    "created_before": _moment,
}


def parse_filter(query: Mapping[str, str]) -> JobFilter:
    """Check query parameters. Raises `InvalidRequest` naming every wrong and unknown one."""
    return JobFilter(**checked_fields(query, _PARSERS))
