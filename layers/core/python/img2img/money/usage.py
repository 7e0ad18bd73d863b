"""Who used what: a counter for each day, key and backend, counted in the transaction that ends a job.

A report reads the counters, so it costs days x keys x backends and not jobs. Days are UTC; a job counts on the day it
ended. Amounts are thousandths of a credit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from img2img.dynamo import Item, Write, integer_in, number, text
from img2img.errors import InvalidRequest
from img2img.values import WrongValue, checked_fields

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

GROUPS = ("day", "key", "backend")
# What an operator, who sees every team, can tell apart.
OPERATOR_GROUPS = ("team", *GROUPS)
MAX_DAYS = 366


@dataclass(frozen=True)
class Counts:
    """What was counted: jobs by how they ended, delivered images, and what they cost."""

    jobs: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    images: int = 0
    charged: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


COUNTED = tuple(item.name for item in fields(Counts))


@dataclass(frozen=True)
class UsageQuery:
    """Which days, both included, and what to tell apart."""

    since: date
    until: date
    group_by: tuple[str, ...] = GROUPS


def _day(value: str) -> date:
    # `fromisoformat` reads weeks as well.
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        with suppress(ValueError):
            return date.fromisoformat(value)
    raise WrongValue("must be a day such as 2026-11-22")


def _group_by(value: str, groups: tuple[str, ...]) -> tuple[str, ...]:
    names = value.split(",")
    if set(names) <= set(groups) and len(set(names)) == len(names):
        return tuple(name for name in groups if name in names)
    raise WrongValue(f"must be one or several of {','.join(groups)}, with commas between them")


def parse_usage_query(query: Mapping[str, str], *, now: float, groups: tuple[str, ...] = GROUPS) -> UsageQuery:
    """Check query parameters; without them it is the current month by all of `groups`. Raises `InvalidRequest`."""
    parsers = {"from": _day, "to": _day, "group_by": lambda value: _group_by(value, groups)}
    values = checked_fields(query, parsers)
    until = values.get("to", datetime.fromtimestamp(now, UTC).date())
    since = values.get("from", until.replace(day=1))
    if since > until:
        raise InvalidRequest.of_field("from", "must not be after `to`")
    if (until - since).days >= MAX_DAYS:
        raise InvalidRequest.of_field("from", f"must be at most {MAX_DAYS} days before the end of `to`")
    return UsageQuery(since, until, values.get("group_by", groups))


def count(
    table: str,
    team: str,
    *,
    key_id: str,
    backend: str,
    at_ms: int,
    status: str,
    delivered: int,
    charged: int,
) -> Write:
    """Return the write that counts a job that ended at `at_ms` as `status`, with so many pictures delivered."""
    day = datetime.fromtimestamp(at_ms / 1000, UTC).date()
    counts = Counts(
        jobs=1,
        succeeded=int(status == "succeeded"),
        failed=int(status == "failed"),
        canceled=int(status == "canceled"),
        images=delivered,
        charged=charged,
    )
    return Write(
        {
            "Update": {
                "TableName": table,
                "Key": {"pk": text(f"TEAM#{team}"), "sk": text(f"USAGE#{day}#{key_id}#{backend}")},
                "UpdateExpression": "ADD " + ", ".join(f"{name} :{name}" for name in COUNTED),
                "ExpressionAttributeValues": {f":{name}": number(getattr(counts, name)) for name in COUNTED},
            }
        }
    )


@dataclass(frozen=True)
class Row:
    """One counter, or the sum of several: then what they differ in is empty."""

    team: str
    day: str
    key: str
    backend: str
    counts: Counts


def _to_row(item: Item) -> Row:
    _, day, key, backend = item["sk"]["S"].split("#", 3)
    # A counter may be older than one of its columns.
    counts = Counts(**{name: integer_in(item, name) for name in COUNTED})
    return Row(item["pk"]["S"].removeprefix("TEAM#"), day, key, backend, counts)


def grouped(rows: Iterable[Row], group_by: Iterable[str]) -> list[Row]:
    """Return the sums over everything that is not in `group_by`."""
    kept = set(group_by)
    sums: dict[tuple[str, str, str, str], Counts] = {}
    for row in rows:
        team, day, key, backend = (getattr(row, name) if name in kept else "" for name in OPERATOR_GROUPS)
        place = (team, day, key, backend)
        sums[place] = sums.get(place, Counts()) + row.counts
    return [Row(*place, counts=sums[place]) for place in sorted(sums)]


def total(rows: Iterable[Row]) -> Counts:
    """Return the sum over all rows."""
    return sum((row.counts for row in rows), Counts())


def as_records(rows: Iterable[Row], columns: Iterable[str], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the rows under the names that a report uses. `columns` are those of `OPERATOR_GROUPS` to show."""
    shown = list(columns)
    records = []
    for row in rows:
        record: dict[str, Any] = {}
        for name in shown:
            record[name] = getattr(row, name)
            if name == "key":
                record["label"] = labels.get(row.key, "")
        records.append(record | {name: getattr(row.counts, name) for name in COUNTED})
    return records


def as_csv(records: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Return records as CSV (RFC 4180) with a header line."""
    # Here: few requests need them, and an import is part of every cold start.
    import csv
    import io

    names = [name for column in columns for name in ((column, "label") if column == "key" else (column,))]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, *COUNTED])
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


class UsageStore:
    """Reads the counters."""

    def __init__(self, client: DynamoDBClient, table: str) -> None:
        self._client = client
        self._table = table

    def rows(self, team: str, since: date, until: date) -> list[Row]:
        """Return a team's counters of these days, both included, in the order of days."""
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
            ExpressionAttributeValues={
                ":pk": text(f"TEAM#{team}"),
                ":first": text(f"USAGE#{since}#"),
                ":last": text(f"USAGE#{until}#~"),
            },
        )
        return [_to_row(item) for page in pages for item in page["Items"]]
