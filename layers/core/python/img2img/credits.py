"""The books of each team: a balance on the team's item, and an append-only ledger that every change of it goes into.

    added == balance + reserved + charged

holds at every moment, because both sides only change together, in one transaction. A job has one `reserve` entry and,
once it has ended, one `settle` entry: the entry's key is made of the job's id and the phase, so neither can be written
twice. All amounts are thousandths of a credit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from img2img.dynamo import Item, cancellations, number, text, through_conflicts
from img2img.errors import AlreadyExists, InsufficientCredits, InvalidRequest, NotFound, ServiceError, TeamDisabled
from img2img.ids import first_id_at, new_id
from img2img.jobs import Job
from img2img.prices import in_credits

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_NOTE = 200
# DynamoDB numbers hold far more; beyond it a typing error is likelier than a purchase.
MAX_AMOUNT = 10**12
_AMOUNTS = ("added", "reserved", "charged", "released")
WRITTEN_ONCE = "attribute_not_exists(pk)"


class Phase(StrEnum):
    """Why a ledger entry was written."""

    TOP_UP = "top_up"
    RESERVE = "reserve"
    SETTLE = "settle"


@dataclass(frozen=True)
class Account:
    """Where a team stands; `entries` is how many entries its ledger has."""

    balance: int = 0
    reserved: int = 0
    charged: int = 0
    added: int = 0
    entries: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger. `about` is a job's id, for a top-up an id of its own."""

    about: str
    phase: Phase
    at_ms: int
    added: int = 0
    reserved: int = 0
    charged: int = 0
    released: int = 0
    note: str = ""


def team_key(team: str) -> dict[str, Any]:
    """Return the key of a team's item."""
    return {"pk": text(f"TEAM#{team}"), "sk": text("TEAM")}


def account_of(item: Item) -> Account:
    """Read the account from a team's item."""
    return Account(**{field.name: int(item[field.name]["N"]) for field in fields(Account)})


def _book(table: str, team: str, entry: Entry, *, conditions: dict[str, Any] | None = None) -> list[Any]:
    """Return the two writes that change an account: the team's item, and the ledger's entry of it.

    `conditions` are further parameters of the update: a condition, and the values that it names.
    """
    changes = {
        "balance": entry.added - entry.reserved + entry.released,
        "reserved": entry.reserved - entry.charged - entry.released,
        "charged": entry.charged,
        "added": entry.added,
        "entries": 1,
    }
    given = dict(conditions or {})
    there_is_a_team = "attribute_exists(pk)"
    account = {
        "TableName": table,
        "Key": team_key(team),
        "UpdateExpression": "ADD " + ", ".join(f"{name} :{name}" for name in changes),
        "ConditionExpression": given.pop("condition", there_is_a_team),
        "ExpressionAttributeValues": {f":{name}": number(change) for name, change in changes.items()} | given,
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
    amounts = {name: getattr(entry, name) for name in _AMOUNTS}
    item = {
        "pk": text(f"TEAM#{team}"),
        "sk": text(f"LEDGER#{entry.about}#{entry.phase}"),
        "at_ms": number(entry.at_ms),
        **{name: number(amount) for name, amount in amounts.items() if amount},
        **({"note": text(entry.note)} if entry.note else {}),
    }
    return [{"Update": account}, {"Put": {"TableName": table, "Item": item, "ConditionExpression": WRITTEN_ONCE}}]


def reserve(table: str, job: Job) -> list[Any]:
    """Return the writes that reserve a new job's price. The first one fails if the team is disabled or too poor."""
    entry = Entry(about=job.id, phase=Phase.RESERVE, at_ms=job.created_ms, reserved=job.credits.reserved)
    in_service = "enabled = :true"
    can_pay = "balance >= :price"
    conditions = {
        "condition": f"{in_service} AND {can_pay}",
        ":true": {"BOOL": True},
        ":price": number(job.credits.reserved),
    }
    return _book(table, job.team, entry, conditions=conditions)


def settle(table: str, job: Job) -> list[Any]:
    """Return the writes that charge an ended job for what it delivered and release the rest."""
    entry = Entry(
        about=job.id,
        phase=Phase.SETTLE,
        at_ms=job.completed_ms or 0,
        charged=job.credits.charged,
        released=job.credits.released,
    )
    return _book(table, job.team, entry)


def refusal(price: int, held: Item | None) -> ServiceError:
    """Return why a team, as its item stood, could not reserve a price."""
    if not held or not held["enabled"]["BOOL"]:
        return TeamDisabled("The team is disabled")
    balance = int(held["balance"]["N"])
    detail = f"This costs {in_credits(price)} credits, the team's balance is {in_credits(balance)}"
    return InsufficientCredits(detail, price=price, balance=balance)


class Credits:
    """Reads the books, and tops them up. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._clock = clock

    def account(self, team: str) -> Account:
        """Return where a team stands now. Raises `NotFound`."""
        answer = self._client.get_item(TableName=self._table, Key=team_key(team), ConsistentRead=True)
        if "Item" not in answer:
            raise NotFound(f"There is no team {team}")
        return account_of(answer["Item"])

    def add(self, team: str, amount: int, *, reference: str = "", note: str = "") -> None:
        """Top a team up or, with a negative amount, take back what was added by mistake.

        A `reference` is booked once: a repeat raises `AlreadyExists`. Raises `NotFound`, `InvalidRequest`, and
        `InsufficientCredits` when less is left than is to be taken back.
        """
        if amount == 0 or abs(amount) > MAX_AMOUNT:
            raise InvalidRequest.of_field("amount", f"must not be 0, and at most {in_credits(MAX_AMOUNT)} credits")
        if reference and not REFERENCE.fullmatch(reference):
            raise InvalidRequest.of_field("reference", "must have 1 to 64 letters, digits, dots, - and _")
        if len(note) > MAX_NOTE:
            raise InvalidRequest.of_field("note", f"must have at most {MAX_NOTE} characters")
        now_ms = int(self._clock() * 1000)
        entry = Entry(about=new_id(now_ms), phase=Phase.TOP_UP, at_ms=now_ms, added=amount, note=note or reference)
        enough_is_left = {"condition": "balance >= :taken", ":taken": number(-amount)}
        writes = _book(self._table, team, entry, conditions=enough_is_left if amount < 0 else None)
        if reference:
            once = {"pk": text(f"TEAM#{team}"), "sk": text(f"REFERENCE#{reference}"), "at_ms": number(now_ms)}
            writes.append({"Put": {"TableName": self._table, "Item": once, "ConditionExpression": WRITTEN_ONCE}})
        try:
            through_conflicts(lambda: self._client.transact_write_items(TransactItems=writes))
        except ClientError as error:
            failed = cancellations(error)
            if failed[2:] == ["ConditionalCheckFailed"]:
                raise AlreadyExists(f"Reference {reference} was booked before; nothing was added") from None
            if failed[:1] != ["ConditionalCheckFailed"]:
                raise
            held: Item | None = error.response["CancellationReasons"][0].get("Item")
            if not held:
                raise NotFound(f"There is no team {team}") from None
            left = int(held["balance"]["N"])
            detail = f"Only {in_credits(left)} credits are left to take back"
            raise InsufficientCredits(detail, price=-amount, balance=left) from None

    def ledger(self, team: str, *, since_ms: int = 0, about: str = "") -> Iterator[Entry]:
        """Yield a team's entries, by the age of what they are about: since then, or about one job or top-up."""
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
            ExpressionAttributeValues={
                ":pk": text(f"TEAM#{team}"),
                ":first": text(f"LEDGER#{about or first_id_at(since_ms)}"),
                ":last": text(f"LEDGER#{about}~"),
            },
            ConsistentRead=True,
        )
        for page in pages:
            for item in page["Items"]:
                _, its_about, phase = item["sk"]["S"].split("#")
                amounts = {name: int(item[name]["N"]) for name in _AMOUNTS if name in item}
                note = str(item["note"]["S"]) if "note" in item else ""
                yield Entry(about=its_about, phase=Phase(phase), at_ms=int(item["at_ms"]["N"]), note=note, **amounts)
